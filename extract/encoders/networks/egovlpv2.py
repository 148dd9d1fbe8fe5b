"""EgoVLPv2 (Pramanick et al., ICCV 2023): space-time transformer and RoBERTa with fusion in the upper half of both."""

import torch
from torch import nn

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint
from egopatch.extract.encoders.layers.projection import projection_layers
from egopatch.extract.encoders.layers.spacetime import SpaceTimeTransformer, VideoSizes
from egopatch.extract.encoders.layers.spacetime_encoder import SpaceTimeEncoder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder, check_depth, resize_time
from egopatch.extract.encoders.networks.network import Network, VideoOptions
from egopatch.extract.encoders.networks.text import build_roberta

BLOCK_EPS = 1e-5
FUSED_NORM_EPS = 1e-6


def build_video(checkpoint: Checkpoint, options: VideoOptions) -> VideoEncoder:
    """The video network down to `options.depth`.

    Args:
        checkpoint: Checkpoint of EgoVLPv2, pretrained or fine-tuned.
        options: Temporal positions are interpolated if the checkpoint has fewer. The path `fused` starts from the
            question-answering network's own CLS token and can run up to the first fused block; `dual` is the
            video-only network and ends with its norm at the last block.

    Raises:
        CheckpointError: Another network's checkpoint; a missing or misshapen tensor; or a depth that is out of range.
    """
    checkpoint.require("egovlpv2")
    sizes = VideoSizes.of(checkpoint)
    depth, path = options.depth, options.path
    if path == "fused":
        check_depth(depth, sizes.fusion, "where the question enters the fused path", checkpoint)
    check_depth(depth, sizes.blocks, "the number of its blocks", checkpoint)
    last = path == "dual" and depth == sizes.blocks
    with torch.device("meta"):
        trunk = SpaceTimeTransformer(sizes, depth, BLOCK_EPS, final_eps=BLOCK_EPS if last else None)
        projection = projection_layers(checkpoint, "vid_proj") if last else None
    names = {name: f"video_model.{name}" for name in trunk.state_dict()}
    if path == "fused":
        names["cls_token"] = "cls_token"
    checkpoint.fill(trunk, names)
    trunk.temporal_embed = nn.Parameter(resize_time(trunk.temporal_embed.detach(), options.num_frames, "interpolate"))
    trunk.frames = options.num_frames
    if projection is not None:
        checkpoint.fill(projection, "vid_proj.")
    return SpaceTimeEncoder(trunk, sizes, projection).to(options.dtype)


NETWORK = Network("egovlpv2", build_video, build_roberta)
