"""What stage one must know of a frozen network. Each network's own file says it once, as `NETWORK`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint
from egopatch.extract.encoders.checkpoints.package import Package
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform

if TYPE_CHECKING:
    from egopatch.extract.encoders.networks.text import TextEncoder

VideoPath = Literal["fused", "dual"]
Variant = Literal["paper", "released"]


@dataclass(frozen=True)
class VideoOptions:
    """What is asked of a video network; see `extract.encoders.load_video_encoder`."""

    num_frames: int = 16
    depth: int = 6
    path: VideoPath = "fused"
    dtype: torch.dtype = torch.float32
    variant: Variant = "paper"
    size: int | None = None


@dataclass(frozen=True)
class Network:
    """A frozen network.

    Attributes:
        name: Value of `encoder.arch` that selects it.
        build_video: loads the video half from a checkpoint.
        build_text: loads the text half down to a depth, from the text checkpoint.
        transform: what it must be shown of a frame.
        package: of the video weights; None where they are a file that the user has.
        text_weights: file of the text weights, by `text.model`; None where they are in the video checkpoint.
    """

    name: str
    build_video: Callable[[Checkpoint, VideoOptions], VideoEncoder]
    build_text: "Callable[[Checkpoint, int], TextEncoder]"
    transform: Transform = EGOVLP_TRANSFORM
    package: Package | None = None
    text_weights: Callable[[str], Path] | None = None
