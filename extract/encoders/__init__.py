"""Frozen encoders: video and text networks, their checkpoints, and the registry that finds them by name.

`checkpoints` reads weight files, `layers` holds the parts that networks share, `networks` has one file a network, and
`registry` looks a network up by `encoder.arch` and loads it. Other packages use the names below.
"""

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.encoders.registry import (
    NETWORKS,
    find_network,
    load_text_encoder,
    load_tokenizer,
    load_video_encoder,
    open_checkpoint,
    open_text_checkpoint,
    weights_path,
)

__all__ = [
    "NETWORKS",
    "Checkpoint",
    "CheckpointError",
    "VideoEncoder",
    "find_network",
    "load_checkpoint",
    "load_text_encoder",
    "load_tokenizer",
    "load_video_encoder",
    "open_checkpoint",
    "open_text_checkpoint",
    "weights_path",
]
