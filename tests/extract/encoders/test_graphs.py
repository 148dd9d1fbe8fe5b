"""When the encoder becomes a CUDA graph, and when it does not; what a graph computes is tested in test_on_device."""

import re
from collections.abc import Callable

import pytest
import torch

from egopatch.extract.encoders.layers.graphs import ReplayedEncoder, capture_cuda
from egopatch.features import PatchTokens


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
        (fails, r"made of it \(operation not permitted"),
        (gives_other_bits, r"gives other bits .*patches by up to 9\.5e-07"),
    ],
)
def test_an_encoder_that_is_no_graph_runs_as_it_is(refused: Callable[..., object], reason: str) -> None:
    encoder, lines = Encoder(), list[str]()
    assert outputs(ReplayedEncoder(encoder, refused, lines.append), encoder, 5) == [1, 2, 3, 4, 5]  # type: ignore[arg-type]
    (line,) = lines
    assert re.search(reason, line)


def test_an_encoder_that_does_not_repeat_its_own_bits_may_be_a_graph() -> None:
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


@pytest.mark.cuda
def test_an_encoder_that_waits_for_its_device_is_no_graph(cuda: torch.device) -> None:
    encoder, lines = Encoder(), list[str]()
    encoder.input = encoder.input.to(cuda)

    def waits() -> PatchTokens:
        assert float(encoder.input) >= 0
        return encoder()

    assert outputs(ReplayedEncoder(waits, capture_cuda, lines.append), encoder, 5) == [1, 2, 3, 4, 5]  # type: ignore[arg-type]
    assert len(lines) == 1
    torch.cuda.synchronize()
    assert float(torch.ones(3, device=cuda).sum()) == 3, "the device works on"
