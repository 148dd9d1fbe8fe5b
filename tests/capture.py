"""A CUDA capture that fails, on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from egopatch.extract.encoders.layers import graphs


def failing_capture(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let torch's streams be names; returns the current one, "the caller's" at first, in a list that is kept up."""
    current = ["the caller's"]

    @contextmanager
    def on_stream(stream: str) -> Iterator[None]:
        before = list(current)
        current[:] = [stream]
        try:
            yield
        finally:
            current[:] = before

    @contextmanager
    def graph(_: object, stream: str, capture_error_mode: str) -> Iterator[None]:
        """As `torch.cuda.graph`, whose end raises before it restores the stream if the capture is invalid."""
        current[:] = [stream]
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error

    for name, stand_in in (("stream", on_stream), ("graph", graph), ("device", lambda _: nullcontext())):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(graphs, "_capture_stream", lambda _: "the capture's")
    return current
