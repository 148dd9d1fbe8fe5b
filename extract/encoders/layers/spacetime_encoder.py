"""The encoder of EgoVLP and EgoVLPv2, and the base of MFAS's: a space-time transformer with an optional projection."""

import torch
from einops import rearrange
from torch import Tensor, nn

from egopatch.extract.encoders.layers.spacetime import SpaceTimeTransformer, VideoSizes
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.features.values.spec import PatchTokens


class SpaceTimeEncoder(VideoEncoder):
    """A space-time transformer down to `depth`.

    Args:
        trunk: The transformer, with as many blocks as are to run.
        sizes: Sizes of the checkpoint's network.
        projection: From CLS to the joint video-text space; None unless the last block of the video-only path runs.
    """

    def __init__(self, trunk: SpaceTimeTransformer, sizes: VideoSizes, projection: nn.Module | None = None) -> None:
        super().__init__(sizes.grid, sizes.width, len(trunk.blocks), trunk.frames, sizes.grid[0] * sizes.patch)
        self.trunk = trunk
        self.projection = projection
        self.trained_frames = sizes.frames
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> PatchTokens:
        """See `VideoEncoder.forward`; saliency comes from the last block that runs."""
        self.check(frames)
        self.pack()
        x, logits = self.trunk(frames.to(self.trunk.pos_embed.dtype))
        t = self.num_frames
        patches = rearrange(x[:, 1:], "b (t n) d -> b t n d", t=t)
        return PatchTokens(x[:, 0], patches, rearrange(logits[:, 1:], "b (t n) -> b t n", t=t))

    @torch.inference_mode()
    def project(self, cls: Tensor) -> Tensor:
        """See `VideoEncoder.project`."""
        if self.projection is None:
            raise ValueError(
                f"project has no meaning at depth {self.depth} of this path; "
                "load the encoder with path='dual' and the network's full depth"
            )
        return self.projection(cls)
