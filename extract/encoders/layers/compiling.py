"""`torch.compile` for encoders, tried on a tiny function first, so that a missing compiler gives a one-line error."""

import time
import warnings

import torch
from torch import nn

from egopatch.configs.schema import ConfigError
from egopatch.extract.encoders.layers.linear import Linear
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.errors import JobFailed
from egopatch.features.common.os_errors import gpu_shortage


class Unpacked(Linear):
    """A layer that never packs its weight: the compiler cannot read a weight in oneDNN's layout."""

    def pack(self) -> None:
        """Do nothing."""


def compile_encoder(encoder: VideoEncoder, device: torch.device) -> VideoEncoder:
    """Mark `encoder` for compilation at its first batch, on `device`, and again for each other batch size.

    The blocks of a `ModuleList` are compiled one by one and share one program, because they are equal; a network
    without such a list is compiled as a whole.

    Raises:
        ConfigError: `torch.compile` does not work on this machine for `device`.
        JobFailed: `device` is a GPU without free memory.
    """
    try:
        # A new length each time, because a cached program would load without a compiler.
        torch.compile(_try, dynamic=False)(torch.zeros(1000 + time.time_ns() % 100_003, device=device))
    except Exception as error:  # the compiler's layers raise many types, all with this meaning
        if shortage := gpu_shortage(error):
            raise JobFailed(
                f"{shortage}, while torch.compile was tried on {device}; free some of its memory, or choose another "
                "--encoder.device"
            ) from error
        reason = " ".join(str(error).split()).partition(" Set TORCHDYNAMO")[0][:160]
        raise ConfigError(
            f"encoder.compile is true, but torch.compile cannot build code for {device.type} here ({reason}); install "
            "a C++ compiler, or set encoder.compile to false"
        ) from error
    # At the first batch torch suggests computing float32 less precisely; here `encoder.dtype` decides the precision.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
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
