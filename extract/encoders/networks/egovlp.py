"""EgoVLP (Lin et al., NeurIPS 2022): space-time transformer and DistilBERT, joined only by their projections."""

import torch
from torch import nn

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint
from egopatch.extract.encoders.layers.spacetime import SpaceTimeTransformer, VideoSizes
from egopatch.extract.encoders.layers.spacetime_encoder import SpaceTimeEncoder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder, check_depth, resize_time
from egopatch.extract.encoders.networks.network import Network, VideoOptions
from egopatch.extract.encoders.networks.text import build_distilbert

EPS = 1e-6


def build_video(checkpoint: Checkpoint, options: VideoOptions) -> VideoEncoder:
    """The video network down to `options.depth`, with the final norm if that is the last block.

    Args:
        checkpoint: Checkpoint of EgoVLP.
        options: Temporal positions beyond the checkpoint's are zero. `path` has no effect.

    Raises:
        CheckpointError: Another network's checkpoint; a missing or misshapen tensor; or a depth that is out of range.
    """
    checkpoint.require("egovlp")
    sizes = VideoSizes.of(checkpoint)
    depth = options.depth
    check_depth(depth, sizes.blocks, "the number of its blocks", checkpoint)
    last = depth == sizes.blocks
    with torch.device("meta"):
        trunk = SpaceTimeTransformer(sizes, depth, EPS, final_eps=EPS if last else None)
        projection = None
        if last:
            projection = nn.Sequential(nn.Linear(sizes.width, checkpoint.shape("vid_proj.0.weight", 2)[0]))
    checkpoint.fill(trunk, "video_model.")
    trunk.temporal_embed = nn.Parameter(resize_time(trunk.temporal_embed.detach(), options.num_frames, "zeros"))
    trunk.frames = options.num_frames
    if projection is not None:
        checkpoint.fill(projection, "vid_proj.")
    return SpaceTimeEncoder(trunk, sizes, projection).to(options.dtype)


NETWORK = Network("egovlp", build_video, build_distilbert)
