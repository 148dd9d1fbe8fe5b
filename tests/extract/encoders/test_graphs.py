"""When the encoder is captured as a CUDA graph, and when it is not; test_on_device tests what a graph computes."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch

from egopatch.extract.encoders.layers import graphs
from egopatch.extract.encoders.layers.graphs import ReplayedEncoder, capture_cuda
from egopatch.features import PatchTokens
from tests.capture import failing_capture


class Encoder:
    """Adds one to its input, and counts its calls."""

    def __init__(self) -> None:
        self.input = torch.zeros(1, 1, 1, 1)
        self.calls = 0

    def __call__(self) -> PatchTokens:
        self.calls += 1
        patches = self.input + 1
        return PatchTokens(cls=patches[:, 0, 0], patches=patches, saliency=patches[..., 0])


def capture(run: Callable[[], PatchTokens]) -> Callable[[], PatchTokens]:
    """Repeats the run; as a graph it computes in the same tensors each time."""
    static = run()

    def replay() -> PatchTokens:
        for name, tensor in run().tensors().items():
            static.tensors()[name].copy_(tensor)
        return static

    return replay


def outputs(replayed: ReplayedEncoder, encoder: Encoder, batches: int) -> list[float]:
    found = []
    for number in range(batches):
        encoder.input.fill_(number)
        found.append(float(replayed().patches))
    return found


def test_the_third_batch_is_replayed() -> None:
    encoder, lines, captured = Encoder(), list[str](), list[int]()

    def counting(run: Callable[[], PatchTokens]) -> Callable[[], PatchTokens]:
        captured.append(encoder.calls)
        return capture(run)

    assert outputs(ReplayedEncoder(encoder, counting, lines.append), encoder, 5) == [1, 2, 3, 4, 5]
    assert captured == [2]
    assert not lines


def fails(_: Callable[[], PatchTokens]) -> Callable[[], PatchTokens]:
    raise RuntimeError("operation not permitted when stream is capturing")


def gives_other_bits(run: Callable[[], PatchTokens]) -> Callable[[], PatchTokens]:
    replay = capture(run)

    def other() -> PatchTokens:
        found = replay()
        found.patches.add_(1e-6)
        return found

    return other


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (fails, r"made of the encoder \(operation not permitted"),
        (gives_other_bits, r"gives different results .*patches by up to 9\.5e-07"),
    ],
)
def test_encoder_that_cannot_be_captured_runs_eagerly(refused: Callable[..., object], reason: str) -> None:
    encoder, lines = Encoder(), list[str]()
    assert outputs(ReplayedEncoder(encoder, refused, lines.append), encoder, 5) == [1, 2, 3, 4, 5]  # type: ignore[arg-type]
    (line,) = lines
    assert re.search(reason, line)


def test_nondeterministic_encoder_may_still_be_captured() -> None:
    encoder, lines, captured = Encoder(), list[str](), list[int]()

    def noisy() -> PatchTokens:
        tokens = encoder()
        tokens.patches.add_(1e-6 * encoder.calls)
        return tokens

    def counting(run: Callable[[], PatchTokens]) -> Callable[[], PatchTokens]:
        captured.append(encoder.calls)
        return gives_other_bits(run)

    outputs(ReplayedEncoder(noisy, counting, lines.append), encoder, 5)
    assert captured == [2]
    assert not lines


def test_a_graph_that_leaves_no_memory_for_an_eager_batch_is_dropped() -> None:
    encoder, lines, full = Encoder(), list[str](), list[bool]()

    def encode() -> PatchTokens:
        if full:
            full.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return encoder()

    def filling(run: Callable[[], PatchTokens]) -> Callable[[], PatchTokens]:
        replay = gives_other_bits(run)

        def last() -> PatchTokens:
            found = replay()
            full.append(True)
            return found

        return last

    assert outputs(ReplayedEncoder(encode, filling, lines.append), encoder, 5) == [1, 2, 3, 4, 5]
    (line,) = lines
    assert "made of the encoder (CUDA out of memory." in line


class Gpus:
    """Stands for torch on two GPUs: what is launched on the one that is captured is kept, on the other it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured_on: int | None = None
        self.kept: list[Callable[[], object]] = []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(graphs, "_capture_stream", lambda device: device.index)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextmanager
    def graph(self, _: object, stream: int = 0, capture_error_mode: str = "global") -> Iterator[None]:
        """`torch.cuda.graph`, whose own stream is one of the GPU that was the current one at its first call."""
        assert capture_error_mode == "thread_local"
        self.captured_on = stream
        yield
        self.captured_on = None

    def launch(self, kernel: Callable[[], object], gpu: int) -> None:
        """Run a kernel, or keep it for `replay`."""
        self.kept.append(kernel) if self.captured_on == gpu else kernel()

    def replay(self) -> None:
        """Run what was kept."""
        for kernel in self.kept:
            kernel()


@pytest.mark.parametrize("gpu", [0, 1])
def test_kernels_on_the_encoders_gpu_are_captured(monkeypatch: pytest.MonkeyPatch, gpu: int) -> None:
    """Otherwise every batch after the second would get the second's tokens, and nobody would notice."""
    gpus, encoder = Gpus(monkeypatch), Encoder()

    def launched() -> PatchTokens:
        found = encoder()
        gpus.launch(lambda: found.patches.copy_(encoder.input + 1), gpu)
        return found

    capturing = partial(capture_cuda, device=torch.device("cuda", gpu))
    assert outputs(ReplayedEncoder(launched, capturing, list[str]().append), encoder, 5) == [1, 2, 3, 4, 5]  # type: ignore[arg-type]


def test_captures_on_a_gpu_share_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS would keep the workspace of each stream, so that every run of a sweep would leave memory behind."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream of", device))
    graphs._capture_stream.cache_clear()
    try:
        first, again, other = (graphs._capture_stream(torch.device("cuda", gpu)) for gpu in (0, 0, 1))
    finally:
        graphs._capture_stream.cache_clear()
    assert first is again
    assert first != other


def test_failed_capture_restores_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later batches would be computed on the capture's stream, beside the copies that wait for the other one."""
    current, encoder, lines = failing_capture(monkeypatch), Encoder(), list[str]()

    def waits() -> PatchTokens:
        tokens = encoder()
        if encoder.calls == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return tokens

    capturing = partial(capture_cuda, device=torch.device("cuda"))
    assert outputs(ReplayedEncoder(waits, capturing, lines.append), encoder, 4) == [1, 2, 3, 4]  # type: ignore[arg-type]
    assert current == ["the caller's"]
    assert "(operation not permitted when stream is capturing)" in lines[0], "not the error of the capture's end"


@pytest.mark.cuda
def test_encoder_that_synchronises_with_its_device_runs_eagerly(cuda: torch.device) -> None:
    encoder, lines = Encoder(), list[str]()
    encoder.input = encoder.input.to(cuda)

    def waits() -> PatchTokens:
        assert float(encoder.input) >= 0
        return encoder()

    capturing = partial(capture_cuda, device=cuda)
    assert outputs(ReplayedEncoder(waits, capturing, lines.append), encoder, 5) == [1, 2, 3, 4, 5]  # type: ignore[arg-type]
    assert len(lines) == 1
    torch.cuda.synchronize()
    assert float(torch.ones(3, device=cuda).sum()) == 3, "the device works on"
