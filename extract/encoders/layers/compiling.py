"""`torch.compile` over an encoder, tried out first so that a machine without a compiler says so in one line."""

import time

import torch
from torch import nn

from egopatch.configs.schema import ConfigError
from egopatch.extract.encoders.layers.linear import Linear
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder


class Unpacked(Linear):
    """A layer whose weight stays as it is: the compiler cannot take one that was laid out for oneDNN already."""

    def pack(self) -> None:
        """Do nothing."""


def compile_encoder(encoder: VideoEncoder) -> VideoEncoder:
    """`encoder`, which is compiled when it first sees clips, and again for each other number of them.

    Listed blocks are alike, so they are compiled one by one and share one program; a network without such a list is
    compiled as a whole.

    Raises:
        ConfigError: `torch.compile` does not work here.
    """
    try:
        # Of a length not seen before: what is in the compiler's cache needs no compiler.
        torch.compile(_try, dynamic=False)(torch.zeros(1000 + time.time_ns() % 100_003))
    except Exception as error:  # whatever the compiler's many layers raise means the same
        reason = " ".join(str(error).split()).partition(" Set TORCHDYNAMO")[0][:160]
        raise ConfigError(
            f"encoder.compile is true, but torch.compile cannot build code here ({reason}); install a C++ compiler, "
            "or set encoder.compile to false"
        ) from error
    for module in encoder.modules():
        if isinstance(module, Linear):
            module.__class__ = Unpacked
    for part in encoder.children():
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        for unit in [block for blocks in lists for block in blocks] or [part]:
            unit.compile(dynamic=False)
    return encoder


def _try(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x + 1)
