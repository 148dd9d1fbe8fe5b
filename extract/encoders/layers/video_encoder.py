"""The interface of every video network: frames in, `PatchTokens` out."""

from collections.abc import Callable, Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.layers.linear import Linear
from egopatch.extract.encoders.layers.spacetime import SpaceTimeTransformer, VideoSizes
from egopatch.features.values.spec import PatchTokens, Scalar


def check_depth(depth: int, deepest: int, what: str, checkpoint: Checkpoint) -> None:
    """Refuse a depth outside 1 to `deepest`; `what` explains the limit in the message.

    Raises:
        CheckpointError: The depth is out of range.
    """
    if not 1 <= depth <= deepest:
        raise CheckpointError(f"{checkpoint.path}: depth is {depth}; expected 1 to {deepest}, {what}")


def resize_time(temporal: Tensor, frames: int, fill: str) -> Tensor:
    """[1, T, D] temporal positions for `frames` frames, by the published rule.

    Fewer frames use the first positions. For more frames, positions are interpolated with aligned corners (`fill`
    "interpolate", EgoVLPv2) or padded with zeros ("zeros", EgoVLP).
    """
    have = temporal.shape[1]
    if frames <= have:
        return temporal[:, :frames].clone()
    if fill == "zeros":
        return F.pad(temporal, (0, 0, 0, frames - have))
    # Bilinear interpolation over [T, D] with D unchanged is linear over T.
    return F.interpolate(temporal[None], (frames, temporal.shape[2]), mode="bilinear", align_corners=True)[0]


class VideoEncoder(nn.Module):
    """A frozen video network down to `depth`.

    Attributes:
        grid: (rows, cols) of the patches of a frame.
        width: Channels of a token, D.
        depth: Number of blocks that run.
        num_frames: T, frames of a clip.
        trained_frames: Frames of a clip that the network was trained on; None where it does not tell frames apart.
        steps: Positions in time of the tokens: T, unless the network makes one of several frames.
        size: Side of the input in pixels.
        identity: What decides the tokens beside the checkpoint's bytes and the config, for the store's fingerprint.
        coarse: M, coarse patches of a frame; None for a network without coarse patches.
        coarse_width: E, channels of the coarse patches; None if they have D.
    """

    coarse: int | None = None
    coarse_width: int | None = None
    trained_frames: int | None = None
    identity: Mapping[str, Scalar] = {}
    _why_no_projection: str | None = None  # of a network that has no joint video-text space
    _packed = False

    def __init__(self, trunk: SpaceTimeTransformer, sizes: VideoSizes, projection: nn.Module | None) -> None:
        super().__init__()
        self.trunk = trunk
        self.projection = projection
        self.grid = sizes.grid
        self.width = sizes.width
        self.depth = len(trunk.blocks)
        self.num_frames = trunk.frames
        self.trained_frames = sizes.frames
        self.size = sizes.grid[0] * sizes.patch
        self.eval().requires_grad_(False)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "VideoEncoder":
        """Drop the packed weights before the weights move or change their type."""
        self._packed = False
        for module in self.modules():
            if isinstance(module, Linear):
                module.unpack()
        return super()._apply(fn, recurse)

    def pack(self) -> None:
        """Pack the weights for the CPU, as the first `forward` does too."""
        if not self._packed:
            for module in self.modules():
                if isinstance(module, Linear):
                    module.pack()
            self._packed = True

    @property
    def steps(self) -> int:
        """See the class."""
        return self.num_frames

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> PatchTokens:
        """Encode clips.

        Args:
            frames: [B, T, 3, size, size], normalised; any floating type, on the encoder's device.

        Returns:
            Tokens at `depth`, in the encoder's type; saliency [B, T, N] in float32 from the same block.

        Raises:
            ValueError: The number of frames or their size differs from what the encoder was loaded for.
        """
        self.check(frames)
        self.pack()
        x, logits = self.trunk(frames.to(self.trunk.pos_embed.dtype))
        t = self.num_frames
        patches = rearrange(x[:, 1:], "b (t n) d -> b t n d", t=t)
        return PatchTokens(x[:, 0], patches, rearrange(logits[:, 1:], "b (t n) -> b t n", t=t))

    def check(self, frames: Tensor) -> None:
        """Refuse frames whose shape the encoder was not loaded for.

        Raises:
            ValueError: The shape is wrong; the message gives both shapes.
        """
        expected = (self.num_frames, 3, self.size, self.size)
        if frames.ndim != 5 or tuple(frames.shape[1:]) != expected:
            raise ValueError(
                f"frames has shape {tuple(frames.shape)}; this encoder takes [B, {', '.join(map(str, expected))}]: "
                "match video.frames and video.size to the checkpoint, or load it with another num_frames"
            )

    @torch.inference_mode()
    def project(self, cls: Tensor) -> Tensor:
        """Joint video-text embedding of CLS tokens.

        Args:
            cls: [B, D], CLS of `forward` at the last depth of the video-only path.

        Returns:
            [B, P].

        Raises:
            ValueError: The encoder stops before the last block, or runs the question-answering path; or the network has
                no joint space.
        """
        if self.projection is None:
            raise ValueError(
                self._why_no_projection
                or f"project has no meaning at depth {self.depth} of this path; "
                "load the encoder with path='dual' and the network's full depth"
            )
        return self.projection(cls)
