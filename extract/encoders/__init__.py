"""Frozen encoders: video and text networks, their checkpoints, and the registry that finds them by name.

`checkpoints` reads weight files, `layers` holds the parts that networks share, `networks` has one file a network,
`registry` finds a network by `encoder.arch` and loads it, and `inspection` reports what a checkpoint contains. The
sentence network is the text half for encoders that have none of their own.
"""

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from egopatch.extract.encoders.layers.text_encoder import TextEncoder, Tokenizer
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.encoders.networks.lite import text_weights as sentence_text_weights
from egopatch.extract.encoders.networks.network import Network, VideoOptions
from egopatch.extract.encoders.networks.text import build_bert as build_sentence_text
from egopatch.extract.encoders.networks.text import load_tokenizer
from egopatch.extract.encoders.registry import (
    NETWORKS,
    find_network,
    input_transform,
    load_text_encoder,
    load_video_encoder,
    open_checkpoint,
    open_text_checkpoint,
    register_encoder,
    weights_path,
)

__all__ = [
    "NETWORKS",
    "Checkpoint",
    "CheckpointError",
    "Network",
    "TextEncoder",
    "Tokenizer",
    "VideoEncoder",
    "VideoOptions",
    "build_sentence_text",
    "find_network",
    "input_transform",
    "load_checkpoint",
    "load_text_encoder",
    "load_tokenizer",
    "load_video_encoder",
    "open_checkpoint",
    "open_text_checkpoint",
    "register_encoder",
    "sentence_text_weights",
    "weights_path",
]
