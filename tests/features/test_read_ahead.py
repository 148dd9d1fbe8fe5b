"""Batches come complete and in order, errors in place of their batch, and memory is bounded by a few batches."""

import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from egopatch.features import AbsentClip, DamagedStore, PatchTokens, Store, open_store
from egopatch.features.store.read_ahead import read_ahead
from tests.features.conftest import IDS
from tests.features.faults import damage_row

BATCHES = [IDS[:3], IDS[5:6], IDS[2:8], (), IDS[::-1], IDS[4:6]]


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("read-ahead", "read_"))]


@pytest.mark.parametrize("depth", [1, 2, 9])
@pytest.mark.parametrize("threads", [1, 3])
def test_read_ahead_yields_every_batch_in_order(store: Store, depth: int, threads: int) -> None:
    seen = 0
    for batch, tokens in zip(BATCHES, read_ahead(store, BATCHES, depth, threads), strict=True):
        for name, tensor in store.read(batch).tensors().items():
            assert torch.equal(tokens.tensors()[name], tensor), name
        seen += len(tokens.cls)
    assert seen == 22
    assert readers() == []


def test_an_empty_list_of_batches_yields_nothing(store: Store) -> None:
    assert list(read_ahead(store, [])) == []


def test_read_ahead_reuses_the_buffers_of_a_few_batches(store: Store) -> None:
    addresses = {
        tokens.patches.data_ptr() for tokens in read_ahead(store, [IDS[n % 7 : n % 7 + 3] for n in range(60)], 2)
    }
    assert len(addresses) <= 3


def test_read_ahead_stays_within_its_depth(store: Store) -> None:
    requested = 0

    def batches() -> Iterator[tuple[str, ...]]:
        nonlocal requested
        for _ in range(20):
            requested += 1
            yield IDS[:2]

    for taken, _ in enumerate(read_ahead(store, batches(), depth=3), start=1):
        assert requested <= taken + 3


def test_read_ahead_reads_while_the_consumer_works(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    started = [threading.Event() for _ in BATCHES]
    calls = iter(started)
    read = Store.read

    def noted(self: Store, *args: object, **options: object) -> PatchTokens:
        next(calls).set()
        return read(self, *args, **options)

    monkeypatch.setattr(Store, "read", noted)
    stream = read_ahead(store, BATCHES, depth=2)
    next(stream)
    assert started[2].wait(10)  # nobody has requested this batch yet
    assert not started[3].is_set()
    stream.close()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [(lambda store: "nobody", AbsentClip), (lambda store: damage_row(store, IDS[9]) or IDS[9], DamagedStore)],
)
def test_an_error_is_raised_in_place_of_its_batch(
    store: Store, spoil: Callable[[Store], str], error: type[Exception]
) -> None:
    bad = spoil(store)
    stream = read_ahead(open_store(store.path), [IDS[:2], IDS[2:4], [IDS[4], bad], IDS[5:7]], depth=3)
    assert len(next(stream).cls) == 2
    assert len(next(stream).cls) == 2
    with pytest.raises(error, match=bad.replace("|", r"\|")):
        next(stream)
    assert readers() == []


def test_an_error_of_the_batch_iterator_follows_the_earlier_batches(store: Store) -> None:
    def batches() -> Iterator[tuple[str, ...]]:
        yield IDS[:2]
        yield IDS[2:4]
        raise RuntimeError("no more lists")

    stream = read_ahead(store, batches(), depth=5)
    assert [len(next(stream).cls) for _ in range(2)] == [2, 2]
    with pytest.raises(RuntimeError, match="no more lists"):
        next(stream)


def test_leaving_the_loop_early_stops_the_reader_threads(store: Store) -> None:
    for _ in read_ahead(store, [IDS] * 1000, depth=4):
        break
    stream = read_ahead(store, [IDS] * 1000, depth=4)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert readers() == []
    del stream
    read_ahead(store, [IDS])  # never begun: nothing was started
    assert readers() == []


def test_the_path_of_a_store_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^store is 'runs/store'; expected an open store: open_store\(path\)$"):
        read_ahead("runs/store", [IDS])  # type: ignore[arg-type]


@pytest.mark.parametrize("batches", ["clip", 3])
def test_batches_that_are_no_lists_are_refused(store: Store, batches: object) -> None:
    with pytest.raises(TypeError, match=rf"^batches is {batches!r}; expected lists of ids, such as \["):
        read_ahead(store, batches)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "value", "kind", "why"),
    [
        ("depth", 0, ValueError, "depth is 0; expected at least 1 batch"),
        ("depth", "2", TypeError, "depth is '2'; expected a whole number, at least 1 batch"),
        ("threads", 0, ValueError, "threads is 0; expected at least 1 thread"),
        ("threads", 1.5, TypeError, "threads is 1.5; expected a whole number, at least 1 thread"),
        ("device", "gpu", ValueError, "device is 'gpu'; expected a device of torch, such as 'cpu' or 'cuda'"),
        ("device", None, ValueError, "device is None; expected a device of torch, such as 'cpu' or 'cuda'"),
    ],
)
def test_an_impossible_depth_number_of_threads_or_device_is_refused(
    store: Store, argument: str, value: object, kind: type[Exception], why: str
) -> None:
    with pytest.raises(kind, match=f"^{why}$"):
        read_ahead(store, BATCHES, **{argument: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("gpus", "device"), [(0, "cuda"), (1, "cuda:1")])
def test_a_gpu_that_is_not_here_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, gpus: int, device: str
) -> None:
    monkeypatch.setattr("egopatch.features.store.read_ahead.usable_gpus", lambda: gpus)
    with pytest.raises(ValueError, match=f"^device is '{device}', but torch sees {gpus} CUDA devices? here; expected"):
        read_ahead(store, BATCHES, device=device)


def test_numbers_of_numpy_count_threads_and_batches(store: Store) -> None:
    (tokens,) = read_ahead(store, BATCHES[:1], depth=np.int64(1), threads=np.int64(2))  # type: ignore[arg-type]
    assert torch.equal(tokens.patches, store.read(BATCHES[0]).patches)


@pytest.mark.parametrize(("threads", "kind"), [(0, ValueError), (-1, ValueError), (None, TypeError), ("2", TypeError)])
def test_a_store_refuses_to_read_with_an_impossible_number_of_threads(
    store: Store, threads: object, kind: type[Exception]
) -> None:
    for read in (store.read, store.to_numpy):
        with pytest.raises(kind, match=rf"^threads is {threads!r}; expected .*at least 1 thread$"):
            read(IDS[:2], threads=threads)  # type: ignore[operator]


class FakeEvent:
    """Stands for a CUDA event: records its stream and counts the waits."""

    made: "list[FakeEvent]"

    def __init__(self) -> None:
        self.stream: object = "that of the current device"
        self.waits = 0
        self.made.append(self)

    def record(self, stream: object = None) -> None:
        self.stream = stream or self.stream

    def synchronize(self) -> None:
        self.waits += 1


def test_buffers_wait_for_copies_to_the_named_device(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may use the second GPU without `set_device`; events of the first do not wait for its copies."""
    events: list[FakeEvent] = []
    buffers, pinned = Store.buffers, []
    monkeypatch.setattr(FakeEvent, "made", events, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr("egopatch.features.store.read_ahead.usable_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"that of {device}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(Store, "buffers", lambda self, rows, pin=False: pinned.append(pin) or buffers(self, rows))
    for _ in read_ahead(store, BATCHES, depth=1, device="cuda:1"):
        pass
    assert {event.stream for event in events} == {"that of cuda:1"}
    # Two buffers serve the six batches: each but the first two of them waits for the copies of the one before.
    assert [event.waits for event in events] == [1, 1, 1, 1, 0, 0]
    assert set(pinned) == {True}
    events.clear()
    pinned.clear()
    for _ in read_ahead(store, BATCHES):
        pass
    assert events == []
    assert set(pinned) == {False}


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])
def test_the_reader_thread_uses_the_gpu_of_its_consumer(
    store: Store, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Threads start on the first GPU, where waiting for an event of the second would allocate memory needlessly."""
    events: list[FakeEvent] = []
    current = threading.local()
    current.gpu = 1  # the consumer's, which called `set_device`
    waited: list[int] = []
    buffers = Store.buffers
    monkeypatch.setattr(FakeEvent, "made", events, raising=False)
    monkeypatch.setattr(FakeEvent, "synchronize", lambda _: waited.append(getattr(current, "gpu", 0)))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr("egopatch.features.store.read_ahead.usable_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"that of {device}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "gpu", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "gpu", device.index))
    monkeypatch.setattr(Store, "buffers", lambda self, rows, pin=False: buffers(self, rows))
    for _ in read_ahead(store, BATCHES, depth=1, device=device):
        pass
    assert waited == [1] * 4
    assert {event.stream for event in events} == {"that of cuda:1"}


@pytest.mark.cuda
@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("FAIL_WITHOUT_CUDA") != "1", reason="needs a CUDA device"
)
def test_pinned_buffers_are_not_refilled_before_the_gpu_copy_ends(store: Store) -> None:
    lists = [IDS[n % 7 : n % 7 + 3] for n in range(200)]
    copies = []
    for tokens in read_ahead(store, lists, device="cuda"):
        assert tokens.patches.is_pinned()
        torch.cuda._sleep(1_000_000)  # the copy waits in line while the loop goes on
        copies.append(tokens.to("cuda", non_blocking=True))
    for ids, copy in zip(lists, copies, strict=True):
        assert torch.equal(copy.patches.cpu(), store.read(ids).patches)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_buffers_wait_for_copies_to_a_second_gpu(store: Store) -> None:
    lists = [IDS[n % 7 : n % 7 + 3] for n in range(200)]
    copies = []
    assert torch.cuda.current_device() == 0
    for tokens in read_ahead(store, lists, device="cuda:1"):
        with torch.cuda.device(1):
            torch.cuda._sleep(1_000_000)
        copies.append(tokens.to("cuda:1", non_blocking=True))
    for ids, copy in zip(lists, copies, strict=True):
        assert torch.equal(copy.patches.cpu(), store.read(ids).patches)
