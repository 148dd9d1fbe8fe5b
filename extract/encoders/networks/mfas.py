"""MFAS (Zhang et al., ICML 2024): EgoVLPv2's lower half twice, over fine and over 2x2-pooled tokens, merged as it goes.

`variant` "paper" is what the paper describes. "released" also repeats what the released code does with the score map:
CLS's logits are cut one token early, so that every patch carries the logit of the one before it, and the first that
of CLS itself. (The head's share of the same option is the number of patches a frame that may grow the kept region:
3 in the paper, 1 as released.)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.layers.spacetime import SpaceTimeBlock, SpaceTimeTransformer
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder, VideoSizes, check_depth, resize_time
from egopatch.extract.encoders.networks.egovlpv2 import BLOCK_EPS, build_text
from egopatch.extract.encoders.networks.network import Network, Variant, VideoOptions
from egopatch.features.values.spec import PatchTokens


def pool2x2(x: Tensor, frames: int) -> Tensor:
    """2x2 max-pool of every frame's square grid in `x` [B, S, D], CLS kept; [B, 1 + T*N/4, D]."""
    b, s, d = x.shape
    side = round(((s - 1) // frames) ** 0.5)
    cells = x[:, 1:].view(b, frames, side // 2, 2, side // 2, 2, d)
    return torch.cat([x[:, :1], cells.amax(dim=(3, 5)).view(b, -1, d)], dim=1)


def repeat2x2(x: Tensor, frames: int) -> Tensor:
    """Every token of `x` [B, 1 + T*M, D] 2x2 times on its frame's grid, CLS kept; [B, 1 + 4*T*M, D]."""
    b, s, d = x.shape
    side = round(((s - 1) // frames) ** 0.5)
    cells = x[:, 1:].view(b, frames, side, 1, side, 1, d).expand(-1, -1, -1, 2, -1, 2, -1)
    return torch.cat([x[:, :1], cells.reshape(b, -1, d)], dim=1)


class TwoTowers(SpaceTimeTransformer):
    """The fine tower of `SpaceTimeTransformer`, a coarse one beside it, and the two learned gates between them.

    Args: as `SpaceTimeTransformer`; there is no final norm.
    """

    def __init__(self, width: int, hidden: int, depth: int, frames: int, patches: int, patch: int, eps: float) -> None:
        super().__init__(width, hidden, depth, frames, patches, patch, eps, None)
        self.cloned_blocks = nn.ModuleList(SpaceTimeBlock(width, hidden, eps) for _ in range(depth))
        self.large_pos_embed = nn.Parameter(torch.empty(1, patches // 4, width))
        self.alpha = nn.Parameter(torch.empty(1))
        self.belta = nn.Parameter(torch.empty(1))  # the published spelling

    def positions(self) -> Tensor:
        """[1, S, D]: as for one tower, plus the position of the 2x2 cell that a patch lies in."""
        large = repeat2x2(F.pad(self.large_pos_embed, (0, 0, 1, 0)), 1)[:, None, 1:]
        grid = self.pos_embed[:, None, 1:] + large + self.temporal_embed[:, :, None]
        return torch.cat([self.pos_embed[:, :1], grid.flatten(1, 2)], dim=1)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, T, 3, H, W] to fine [B, S, D] and coarse [B, 1 + T*M, D] tokens, and CLS's mean logits over each."""
        fine = self.embed(frames)
        coarse = pool2x2(fine, self.frames)
        last = len(self.blocks) - 1
        fine_logits: Tensor | None = None
        coarse_logits: Tensor | None = None
        for i, (fine_block, coarse_block) in enumerate(zip(self.blocks, self.cloned_blocks, strict=True)):
            fine, fine_logits = fine_block(fine, self.frames, tap=i == last)
            coarse, coarse_logits = coarse_block(coarse, self.frames, tap=i == last)
            up, down = repeat2x2(coarse, self.frames), pool2x2(fine, self.frames)
            fine, coarse = fine + self.alpha * up, coarse + self.belta * down
        assert fine_logits is not None
        assert coarse_logits is not None
        return fine, coarse, fine_logits, coarse_logits


class MfasEncoder(VideoEncoder):
    """MFAS's lower half; its `PatchTokens` carry the coarse tower too."""

    def __init__(self, trunk: TwoTowers, sizes: VideoSizes, variant: Variant) -> None:
        super().__init__(trunk, sizes, None)
        self.variant = variant
        self.coarse = (sizes.grid[0] // 2) * (sizes.grid[1] // 2)

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> PatchTokens:
        """[B, T, 3, size, size] to fine and coarse tokens; errors as in `VideoEncoder.forward`."""
        self.check(frames)
        self.pack()
        assert isinstance(self.trunk, TwoTowers)
        fine, coarse, over_fine, over_coarse = self.trunk.encode(frames.to(self.trunk.pos_embed.dtype))
        b, t = frames.shape[:2]
        cut = slice(0, -1) if self.variant == "released" else slice(1, None)
        return PatchTokens(
            cls=fine[:, 0],
            patches=fine[:, 1:].unflatten(1, (t, -1)),
            saliency=over_fine[:, cut].reshape(b, t, -1),
            coarse=coarse[:, 1:].unflatten(1, (t, -1)),
            coarse_saliency=over_coarse[:, cut].reshape(b, t, -1),
        )


def build_video(checkpoint: Checkpoint, options: VideoOptions) -> MfasEncoder:
    """The two towers down to `options.depth`, on the question-answering path.

    From an EgoVLPv2 checkpoint the coarse tower starts as a copy of the fine one, the cell positions and both gates
    at zero.

    Args:
        checkpoint: of MFAS or EgoVLPv2.
        options: temporal positions are interpolated where the checkpoint has fewer.

    Raises:
        CheckpointError: another network's checkpoint, a tensor missing or re-shaped, no such depth, or a grid that
            2x2 cells do not cover.
    """
    checkpoint.require("mfas", "egovlpv2")
    sizes = VideoSizes.of(checkpoint)
    depth = options.depth
    check_depth(depth, sizes.fusion, "where the question enters", checkpoint)
    if sizes.grid[0] % 2:
        raise CheckpointError(
            f"{checkpoint.path}: its grid is {sizes.grid}; MFAS pools 2x2 patches, so it needs even sides"
        )
    with torch.device("meta"):
        trunk = TwoTowers(sizes.width, sizes.hidden, depth, sizes.frames, sizes.patches, sizes.patch, BLOCK_EPS)
    complete = checkpoint
    if checkpoint.network == "egovlpv2":
        complete = _started_from_egovlpv2(checkpoint, sizes)
    names = {name: f"video_model.{name}" for name in trunk.state_dict()}
    complete.fill(trunk, names | {name: name for name in ("cls_token", "alpha", "belta")})
    trunk.temporal_embed = nn.Parameter(resize_time(trunk.temporal_embed.detach(), options.num_frames, "interpolate"))
    trunk.frames = options.num_frames
    return MfasEncoder(trunk, sizes, options.variant).to(options.dtype)


def _started_from_egovlpv2(checkpoint: Checkpoint, sizes: VideoSizes) -> Checkpoint:
    fine = "video_model.blocks."
    copied = {
        name.replace(fine, "video_model.cloned_blocks."): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(fine) and int(name.removeprefix(fine).split(".")[0]) < sizes.fusion
    }
    zeros = {
        "video_model.large_pos_embed": torch.zeros(1, sizes.patches // 4, sizes.width),
        "alpha": torch.zeros(1),
        "belta": torch.zeros(1),
    }
    return Checkpoint(checkpoint.path, checkpoint.container, {**checkpoint.tensors, **copied, **zeros})


NETWORK = Network("mfas", build_video, build_text)
