"""Batches of clips, read ahead of their consumer into memory that is reused.

for tokens in read_ahead(store, [["a", "b"], ["c"]]):
    work_on(tokens)  # meanwhile the next batches are being read
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import torch

from egopatch.features.common.machine import usable_gpus
from egopatch.features.common.units import counted
from egopatch.features.values.errors import one_line, require_count, require_type
from egopatch.features.values.spec import PatchTokens


@runtime_checkable
class ClipSource(Protocol):
    """A source of clips: a `Store`, or anything that reads like one."""

    def buffers(self, rows: int, pin: bool = False) -> PatchTokens:
        """As `Store.buffers`."""

    def read(self, ids: Sequence[str], *, out: PatchTokens, threads: int) -> PatchTokens:
        """As `Store.read`."""


def read_ahead(
    store: ClipSource,
    batches: Iterable[Sequence[str]],
    depth: int = 2,
    threads: int = 2,
    device: "torch.device | str" = "cpu",
) -> Iterator[PatchTokens]:
    """The patch tokens of each list of ids in `batches`, in order, as `Store.read` gives them.

    Memory is bounded by depth + 1 of the longest batches. A batch's memory is refilled after the consumer asks for the
    next batch, and after copies to `device` that were started on its current stream by then. Leaving the loop early
    stops the reading.

    Args:
        store: Store of clips, or another source.
        batches: Lists of clip ids; a generator is advanced only as needed.
        depth: Number of batches that are read ahead.
        threads: Number of threads that read the clips of one batch.
        device: Device that the consumer copies to. For a GPU the memory is pinned, so that copies overlap with other
            work.

    Raises:
        TypeError: `store` is not a source of clips, but for example the path of a store, or `batches` is one id; or
            `depth` or `threads` is no whole number.
        ValueError: `depth` or `threads` is below 1, or `device` is not a device of torch or a GPU that is not here.
        StoreError: As in `Store.read`; this and errors from `batches` are raised in place of the batch they concern.
    """
    require_type("store", store, ClipSource, "an open store: open_store(path)")
    if isinstance(batches, str) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is {one_line(batches)}; expected lists of ids, such as [store.clip_ids[:8]]")
    require_count("depth", depth, "batch")
    require_count("threads", threads, "thread")
    return _read_ahead(store, iter(batches), depth, threads, _device(device))


def _device(device: object) -> torch.device:
    try:
        found = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {one_line(device)}; expected a device of torch, such as 'cpu' or 'cuda'") from None
    if found.type == "cuda" and (found.index or 0) >= (gpus := usable_gpus()):
        raise ValueError(
            f"device is '{found}', but torch sees {counted(gpus, 'CUDA device')} here; expected one of them or 'cpu'"
        )
    return found


def _read_ahead(
    store: ClipSource, batches: Iterator[Sequence[str]], depth: int, threads: int, device: torch.device
) -> Iterator[PatchTokens]:
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    free = deque(_Buffer(store, threads, device) for _ in range(depth + 1))
    reading: deque[tuple[Future[PatchTokens], _Buffer]] = deque()
    with ThreadPoolExecutor(1, "read-ahead", _make_current, (device,)) as pool:
        started = _started(pool, batches, free)
        try:
            while True:
                while free and (batch := next(started, None)):
                    reading.append((batch, free.popleft()))
                if not reading:
                    return
                future, buffer = reading.popleft()
                yield future.result()
                buffer.release()
                free.append(buffer)
        finally:
            pool.shutdown(cancel_futures=True)


def _make_current(device: torch.device) -> None:
    """Make a GPU current in this thread, which starts on the first one: waiting there for another takes half a GB."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _started(
    pool: ThreadPoolExecutor, batches: Iterator[Sequence[str]], free: "deque[_Buffer]"
) -> Iterator[Future[PatchTokens]]:
    """Start to read each batch into the first of the `free` buffers."""
    try:
        for ids in batches:
            yield pool.submit(free[0].fill, ids)
    except Exception as error:  # it is raised when the consumer reaches this batch
        failed: Future[PatchTokens] = Future()
        failed.set_exception(error)
        yield failed


class _Buffer:
    """Memory for one batch, which grows to the longest batch so far."""

    def __init__(self, store: ClipSource, threads: int, device: torch.device) -> None:
        self._store = store
        self._threads = threads
        self._device = device
        self._memory: PatchTokens | None = None
        self._copied: torch.cuda.Event | None = None

    def fill(self, ids: Sequence[str]) -> PatchTokens:
        """Read `ids` into the buffer, once the GPU has copied its former content."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._memory is None or len(self._memory.cls) < len(ids):
            self._memory = self._store.buffers(len(ids), pin=self._device.type == "cuda")
        return self._store.read(ids, out=self._memory, threads=self._threads)

    def release(self) -> None:
        """End the consumer's use of the buffer: all copies that it started are on the stream by now."""
        if self._device.type == "cuda":
            self._copied = torch.cuda.Event()
            # Without a stream it would be recorded on the current device, where no copy may be running.
            self._copied.record(torch.cuda.current_stream(self._device))
