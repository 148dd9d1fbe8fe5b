"""CUDA graphs, and one of the encoder: one call launches all of a batch's kernels.

Launching them one by one takes some milliseconds of Python, which this process also needs to receive decoded clips and
to write rows; a graph takes none.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from egopatch.features.values.spec import PatchTokens

Result = TypeVar("Result")
Capture = Callable[[Callable[[], Result]], Callable[[], Result]]

EAGER_BATCHES = 2  # before the capture: libraries choose their kernels and take their memory


class ReplayedEncoder:
    """Calls `encode`, which reads its input from the same memory each time, and replays it once it has been captured.

    A replay must give the same bits as `encode`, because a clip's rows must not depend on when they are computed. If it
    gives others although `encode` reproduces its own, or if something in the network cannot be captured, `encode` is
    called for every batch.

    Args:
        encode: The encoder; a replay overwrites the tensors of the previous one.
        capture: Runs a function once and returns a function that replays it; `capture_cuda` on the encoder's device.
        say: Called once with a line if the encoder cannot be captured.
    """

    def __init__(self, encode: Callable[[], PatchTokens], capture: Capture, say: Callable[[str], None]) -> None:
        self._encode = encode
        self._capture = capture
        self._say = say
        self._batches = 0
        self._replay: Callable[[], PatchTokens] | None = None

    def __call__(self) -> PatchTokens:
        """The tokens of the input as it is now; valid until the next call."""
        self._batches += 1
        if self._replay is not None:
            return self._replay()
        tokens = self._encode()
        if self._batches == EAGER_BATCHES:
            self._replay = self._captured(tokens)
        return tokens

    def _captured(self, expected: PatchTokens) -> Callable[[], PatchTokens] | None:
        try:
            replay = self._capture(self._encode)
            off = _difference(expected, replay())
            # Beside the graph, another eager batch may lack memory.
            reproduces = bool(off) and not _difference(expected, self._encode())
        except RuntimeError as error:  # torch has no type of its own for an operation that cannot be captured
            self._say(
                f"note: no CUDA graph can be made of the encoder ({capture_failure(error)}), so its kernels are "
                "launched one by one"
            )
            return None
        if reproduces:
            self._say(
                f"note: a CUDA graph of the encoder gives different results ({off}), so its kernels are launched one "
                "by one"
            )
            return None
        return replay


def _difference(expected: PatchTokens, found: PatchTokens) -> str:
    """The arrays that differ, each with its largest difference; empty if none do."""
    tensors = found.tensors()
    return ", ".join(
        f"{name} by up to {float((tensors[name].float() - tensor.float()).abs().max()):.1e}"
        for name, tensor in expected.tensors().items()
        if not torch.equal(tensors[name], tensor)
    )


def capture_cuda(run: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Capture what `run` launches on `device`; the function that is returned launches it again and returns its result.

    Raises:
        RuntimeError: `run` does something that a graph cannot hold, such as waiting for the device.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
    # A failed capture leaves its stream current, where nobody waits for later work: hence `torch.cuda.stream`.
    # Other threads may use the GPU meanwhile, such as one that pins memory.
    with (
        torch.cuda.device(device),
        torch.cuda.stream(stream),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        result = run()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures on a device, because cuBLAS keeps a workspace for each stream until the process ends.

    torch's own belongs to the GPU that was current at the first capture of this process. Kernels on another GPU would
    run instead of being captured, so that a replay would do nothing and return the same results again.
    """
    return torch.cuda.Stream(device)


def capture_failure(error: RuntimeError) -> str:
    """First line of what made a CUDA capture fail, from the error that ended it."""
    return str(capture_cause(error)).partition("\n")[0]


def capture_cause(error: RuntimeError) -> RuntimeError:
    """The error that made a CUDA capture fail, from the one that ended it.

    The end of an invalid capture raises an error of its own, which names no cause: that is the error before it.
    """
    return error.__context__ if isinstance(error.__context__, RuntimeError) else error
