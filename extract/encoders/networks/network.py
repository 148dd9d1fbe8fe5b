"""`Network`, the description of a frozen network that stage one uses. Each network's file ends with its own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, load_checkpoint
from egopatch.extract.encoders.checkpoints.package import Package
from egopatch.extract.encoders.layers.text_encoder import TextEncoder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform

VideoPath = Literal["fused", "dual"]
Variant = Literal["paper", "released"]
SaliencyKind = Literal["auto", "cls", "norm", "attention"]


@dataclass(frozen=True)
class VideoOptions:
    """How to load a video network; the options of `extract.encoders.load_video_encoder`."""

    num_frames: int = 16
    depth: int = 6
    path: VideoPath = "fused"
    dtype: torch.dtype = torch.float32
    variant: Variant = "paper"
    size: int | None = None
    saliency: SaliencyKind = "auto"


@dataclass(frozen=True)
class Network:
    """A frozen network.

    Attributes:
        name: Value of `encoder.arch` that selects it.
        build_video: Loads the video half from a checkpoint.
        build_text: Loads the text half down to a depth, from the text checkpoint.
        transform: Turns decoded frames into the network's input; or a function that returns the transform for the
            checkpoint and the side of the input in pixels.
        package: Installed package with the video weights; None if the user has them as a file.
        text_weights: Finds the file of the text weights by `text.model`; None if the video checkpoint has them too.
        open_checkpoint: Reads the video weights, and those of `text_weights`.
        plugin: Name and version of the installed package that registers it; None if it is not from a package.
        locate: Finds the file or folder that `encoder.checkpoint` names; None if that is always a path.
    """

    name: str
    build_video: Callable[[Checkpoint, VideoOptions], VideoEncoder]
    build_text: Callable[[Checkpoint, int], TextEncoder]
    transform: Transform | Callable[[Path, int], Transform] = EGOVLP_TRANSFORM
    package: Package | None = None
    text_weights: Callable[[str], Path] | None = None
    open_checkpoint: Callable[[Path], Checkpoint] = load_checkpoint
    plugin: str | None = None
    locate: Callable[[Path], Path] | None = None
