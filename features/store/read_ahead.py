"""Batches of clips, read ahead of their consumer into memory that is used again and again.

for tokens in read_ahead(store, [["a", "b"], ["c"]]):
    work_on(tokens)  # meanwhile the next batches are being read
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from egopatch.features.store.store import Store
from egopatch.features.values.spec import PatchTokens


def read_ahead(
    store: Store, batches: Iterable[Sequence[str]], depth: int = 2, threads: int = 2, pin: bool = False
) -> Iterator[PatchTokens]:
    """The patch tokens of each list of ids in `batches`, in order, as `Store.read` gives them.

    Memory is that of depth + 1 of the longest batches, however many there are. A batch lies in memory that is filled
    again once the next one is asked for; a copy to a GPU that was started on the current stream by then is waited for.
    Leaving the loop early ends the reading.

    Args:
        store: of clips.
        batches: lists of clip ids; taken from a generator only as they are needed.
        depth: batches that are read ahead.
        threads: that read the clips of one batch.
        pin: read into pinned memory, from which copies to a GPU run beside other work.

    Raises:
        ValueError: `depth` is below 1.
        StoreError: as `Store.read`, and whatever `batches` raises, each in the place of its batch.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; expected at least 1 batch")
    return _read_ahead(store, iter(batches), depth, threads, pin)


def _read_ahead(
    store: Store, batches: Iterator[Sequence[str]], depth: int, threads: int, pin: bool
) -> Iterator[PatchTokens]:
    free = deque(_Buffer(store, threads, pin) for _ in range(depth + 1))
    reading: deque[tuple[Future[PatchTokens], _Buffer]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        try:
            more = True
            while True:
                while more and free:
                    future, more = _start(pool, batches, free[0])
                    if future is not None:
                        reading.append((future, free.popleft()))
                if not reading:
                    return
                future, buffer = reading.popleft()
                yield future.result()
                buffer.hand_back()
                free.append(buffer)
        finally:
            pool.shutdown(cancel_futures=True)


def _start(
    pool: ThreadPoolExecutor, batches: Iterator[Sequence[str]], buffer: "_Buffer"
) -> tuple[Future[PatchTokens] | None, bool]:
    """Start to read the next batch; also whether another one may follow."""
    try:
        return pool.submit(buffer.fill, next(batches)), True
    except StopIteration:
        return None, False
    except Exception as error:  # belongs to a batch that the consumer has not reached yet
        failed: Future[PatchTokens] = Future()
        failed.set_exception(error)
        return failed, False


class _Buffer:
    """Memory for one batch, which grows to the longest that it has held."""

    def __init__(self, store: Store, threads: int, pin: bool) -> None:
        self._store = store
        self._threads = threads
        self._pin = pin
        self._memory: PatchTokens | None = None
        self._copied: torch.cuda.Event | None = None

    def fill(self, ids: Sequence[str]) -> PatchTokens:
        """Read `ids` into it, once the GPU has taken what it held before."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._memory is None or len(self._memory.cls) < len(ids):
            self._memory = self._store.buffers(len(ids), self._pin)
        return self._store.read(ids, out=self._memory, threads=self._threads)

    def hand_back(self) -> None:
        """Called when the consumer is through with it: whatever it told the GPU to copy is on the stream by now."""
        if self._pin:
            self._copied = torch.cuda.Event()
            self._copied.record()
