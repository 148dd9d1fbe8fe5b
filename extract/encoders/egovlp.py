"""EgoVLP (Lin et al., NeurIPS 2022): space-time transformer and DistilBERT, joined only by their projections."""

import torch
from torch import nn

from extract.encoders.checkpoint import Checkpoint, CheckpointError
from extract.encoders.spacetime import SpaceTimeTransformer
from extract.encoders.video_encoder import VideoEncoder, VideoSizes, check_depth, resize_time

EPS = 1e-6


def build_video(checkpoint: Checkpoint, num_frames: int, depth: int, dtype: torch.dtype) -> VideoEncoder:
    """The video network down to `depth`; the norm follows at the last block.

    Args:
        checkpoint: of EgoVLP.
        num_frames: T; temporal positions that the checkpoint lacks are zero.
        depth: blocks to run.
        dtype: of weights and arithmetic.

    Raises:
        CheckpointError: another network's checkpoint, a tensor missing or re-shaped, or no such depth.
    """
    checkpoint.require("egovlp")
    sizes = VideoSizes.of(checkpoint)
    check_depth(depth, sizes.blocks, "the number of its blocks", checkpoint)
    last = depth == sizes.blocks
    with torch.device("meta"):
        trunk = SpaceTimeTransformer(
            sizes.width, sizes.hidden, depth, sizes.frames, sizes.patches, sizes.patch, EPS, EPS if last else None
        )
        projection = nn.Sequential(nn.Linear(sizes.width, checkpoint.shape("vid_proj.0.weight")[0])) if last else None
    checkpoint.fill(trunk, "video_model.")
    trunk.temporal_embed = nn.Parameter(resize_time(trunk.temporal_embed.detach(), num_frames, "zeros"))
    trunk.frames = num_frames
    if projection is not None:
        checkpoint.fill(projection, "vid_proj.")
    return VideoEncoder(trunk, sizes, projection).to(dtype)


def text_layers(checkpoint: Checkpoint) -> int:
    """Layers of the text network.

    Raises:
        CheckpointError: there is none.
    """
    layers = checkpoint.count(r"text_model\.transformer\.layer\.(\d+)\.")
    if not layers:
        raise CheckpointError(f"{checkpoint.path}: has no DistilBERT layers under text_model.transformer.layer")
    return layers
