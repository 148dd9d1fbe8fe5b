"""What a worker of stage one needs: the frozen encoder on its device, and decoders that fit it."""

import functools

import torch

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.encoders import Checkpoint, VideoEncoder, find_network, load_video_encoder
from egopatch.extract.video.decode import DecodePool, prepare_clip


def load_encoder(config: Config, checkpoint: Checkpoint, device: str | None = None) -> VideoEncoder:
    """The frozen video encoder in evaluation mode, on `device` or else on `encoder.device`.

    Raises:
        CheckpointError: not a checkpoint of `encoder.arch`, or `video.size` is not what it was trained on.
        ConfigError: the device is not there, or `encoder.compile` has no compiler.
    """
    encoder = load_video_encoder(
        config.encoder.arch,
        checkpoint,
        num_frames=config.video.frames,
        depth=config.encoder.depth,
        path=config.encoder.path,
        size=config.video.size,
        compile=config.encoder.compile,
        dtype=getattr(torch, config.encoder.dtype),
        variant=config.encoder.variant,
    )
    return encoder.to(device_of(device or config.encoder.device)).eval()


def open_decoders(config: Config, workers: int) -> DecodePool:
    """Decoder children that show of a frame what the configured network was trained to see."""
    prepare = functools.partial(prepare_clip, transform=find_network(config.encoder.arch).transform)
    return DecodePool(config.video, workers, prepare)


def device_of(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else CPU.

    Raises:
        ConfigError: a CUDA device was asked for and there is none, or none of that number.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"encoder.device is {name!r}; torch sees no CUDA device here: use auto or cpu")
    device = torch.device(name)
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ConfigError(
            f"encoder.device is {name!r}; torch sees CUDA devices 0 to {last} here: use one of them or auto"
        )
    return device


def has_bfloat16() -> bool:
    """Whether torch's matrix products use instructions of this CPU for bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_arithmetic(config: Config) -> str | None:
    """One line where the configured arithmetic is far slower on this machine than another would be."""
    if device_of(config.encoder.device).type == "cpu" and config.encoder.dtype == "bfloat16" and not has_bfloat16():
        return (
            "encoder.dtype is bfloat16 and this CPU has no instructions for it, which takes about 6 times as long as"
            " float32: consider --encoder.dtype float32 (another fingerprint, so another store)"
        )
    return None
