"""Frozen networks of stage one, cut out of the published checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from extract.encoders import egovlp, egovlpv2, mfas
from extract.encoders.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from extract.encoders.video_encoder import VideoEncoder

if TYPE_CHECKING:
    from extract.encoders.text import TextEncoder, Tokenizer

Arch = Literal["egovlp", "egovlpv2", "mfas"]
VideoPath = Literal["fused", "dual"]

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "VideoEncoder",
    "load_checkpoint",
    "load_text_encoder",
    "load_tokenizer",
    "load_video_encoder",
]


def load_video_encoder(
    arch: Arch,
    checkpoint: Path | str | Checkpoint,
    num_frames: int = 16,
    depth: int = 6,
    path: VideoPath = "fused",
    dtype: torch.dtype = torch.float32,
    variant: mfas.Variant = "paper",
) -> VideoEncoder:
    """Load a video network, frozen and in evaluation mode, on the CPU.

    Args:
        arch: the network; EgoVLP has one path only and ignores `path`.
        checkpoint: file, or one already read.
        num_frames: T, frames of a clip.
        depth: blocks to run; tokens of the last depth carry the final norm.
        path: `fused` is the question-answering half-network, `dual` the video-only network.
        dtype: of weights and arithmetic.
        variant: MFAS only: as the paper says, or with the released code's quirks; see `extract.encoders.mfas`.

    Raises:
        CheckpointError: unreadable, another network's, or lacking what this path needs.
        ValueError: an unknown `arch`, `path` or `variant`, or no frames.
    """
    _check(arch)
    if path not in get_args(VideoPath):
        raise ValueError(f"path is {path!r}; expected fused or dual")
    if variant not in get_args(mfas.Variant):
        raise ValueError(f"variant is {variant!r}; expected paper or released")
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")
    loaded = _read(checkpoint)
    if arch == "egovlp":
        return egovlp.build_video(loaded, num_frames, depth, dtype)
    if arch == "mfas":
        return mfas.build_video(loaded, num_frames, depth, variant, dtype)
    return egovlpv2.build_video(loaded, num_frames, depth, path, dtype)


def load_text_encoder(arch: Arch, checkpoint: Path | str | Checkpoint, depth: int = 6) -> "TextEncoder":
    """Load a text network, frozen and in evaluation mode, on the CPU in float32.

    Args:
        arch: the network.
        checkpoint: file, or one already read.
        depth: layers to run.

    Raises:
        CheckpointError: as for `load_video_encoder`.
        ValueError: an unknown `arch`.
    """
    _check(arch)
    # transformers takes seconds to import, and the video half does not need it.
    from extract.encoders import text

    build = text.build_distilbert if arch == "egovlp" else text.build_roberta
    return build(_read(checkpoint), depth)


def load_tokenizer(model: str, max_length: int = 30) -> "Tokenizer":
    """Load a tokenizer; see `extract.encoders.text.load_tokenizer`."""
    from extract.encoders import text

    return text.load_tokenizer(model, max_length)


def _check(arch: str) -> None:
    if arch not in get_args(Arch):
        raise ValueError(f"arch is {arch!r}; expected one of {', '.join(get_args(Arch))}")


def _read(checkpoint: Path | str | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
