"""The interface of every video network: frames in, `PatchTokens` out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.layers.linear import Linear
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


class VideoEncoder(nn.Module, ABC):
    """A frozen video network down to `depth`: the base of every encoder, those of other packages included.

    A subclass passes `grid`, `width`, `depth`, `num_frames` and `size` to `super().__init__`, and has a `forward`.

    Attributes:
        grid: (rows, cols) of the patches of a frame.
        width: Channels of a token, D.
        depth: Number of blocks that run.
        num_frames: T, frames of a clip.
        trained_frames: Frames of a clip that the network was trained on; None where it does not tell frames apart.
        steps: Positions in time of the tokens: T, unless the network makes one of several frames.
        size: Side of the input in pixels.
        identity: Settings beside the checkpoint's bytes and the config that decide the tokens, for the fingerprint.
        coarse: M, coarse patches of a frame; None for a network without coarse patches.
        coarse_width: E, channels of the coarse patches; None if they have D.
    """

    coarse: int | None = None
    coarse_width: int | None = None
    trained_frames: int | None = None
    identity: Mapping[str, Scalar] = {}
    _why_no_projection = "project has no meaning for this network, which has no joint video-text space"
    _packed = False

    def __init__(self, grid: tuple[int, int], width: int, depth: int, num_frames: int, size: int) -> None:
        super().__init__()
        self.grid = grid
        self.width = width
        self.depth = depth
        self.num_frames = num_frames
        self.size = size

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

    @abstractmethod
    def forward(self, frames: Tensor) -> PatchTokens:
        """Encode clips. On a CPU several threads call this at once.

        Args:
            frames: [B, T, 3, size, size], normalised; any floating type, on the encoder's device.

        Returns:
            Tokens at `depth`, in the encoder's type; saliency [B, T', N] in float32, where T' is `steps`.

        Raises:
            ValueError: The number of frames or their size differs from what the encoder was loaded for.
        """

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

    def project(self, cls: Tensor) -> Tensor:
        """Joint video-text embedding of CLS tokens, for networks that have such a space.

        Args:
            cls: [B, D], CLS of `forward` at the last depth of the video-only path.

        Returns:
            [B, P].

        Raises:
            ValueError: The network has no joint space, or the encoder stops before the last block or runs the
                question-answering path.
        """
        raise ValueError(self._why_no_projection)
