"""MFAS (Zhang et al., ICML 2024): EgoVLPv2's lower half twice, over fine and 2x2-pooled tokens, merged in every block.

`variant` "paper" is the network of the paper. "released" reproduces the score map of the released code: it slices CLS's
logits one token too early, so that each patch carries the logit of the patch before it, and the first patch CLS's own.
(The head reads the same option: up to 3 patches a frame grow the kept region in the paper, 1 in the released code.)
"""

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.layers.spacetime import SpaceTimeBlock, SpaceTimeTransformer, VideoSizes
from egopatch.extract.encoders.layers.spacetime_encoder import SpaceTimeEncoder
from egopatch.extract.encoders.layers.video_encoder import check_depth, resize_time
from egopatch.extract.encoders.networks.egovlpv2 import BLOCK_EPS
from egopatch.extract.encoders.networks.network import Network, Variant, VideoOptions
from egopatch.extract.encoders.networks.text import build_roberta
from egopatch.features.values.spec import PatchTokens


def pool2x2(x: Tensor, frames: int) -> Tensor:
    """2x2 max-pool of every frame's square grid in `x` [B, S, D], CLS kept; [B, 1 + T*N/4, D]."""
    rows = round(((x.shape[1] - 1) // frames) ** 0.5) // 2
    cells = reduce(x[:, 1:], "b (t rows i cols j) d -> b (t rows cols) d", "max", t=frames, rows=rows, i=2, j=2)
    return torch.cat([x[:, :1], cells], dim=1)


def repeat2x2(x: Tensor, frames: int) -> Tensor:
    """Repeat every token of `x` [B, 1 + T*M, D] 2x2 times on its frame's grid, CLS kept; [B, 1 + 4*T*M, D]."""
    rows = round(((x.shape[1] - 1) // frames) ** 0.5)
    cells = repeat(x[:, 1:], "b (t rows cols) d -> b (t rows i cols j) d", t=frames, rows=rows, i=2, j=2)
    return torch.cat([x[:, :1], cells], dim=1)


class TwoTowers(SpaceTimeTransformer):
    """The fine tower of `SpaceTimeTransformer`, a coarse one beside it, and the two learned gates between them.

    Args: As for `SpaceTimeTransformer`; there is no final norm.
    """

    def __init__(self, sizes: VideoSizes, depth: int, eps: float) -> None:
        super().__init__(sizes, depth, eps, None)
        self.cloned_blocks = nn.ModuleList(SpaceTimeBlock(sizes.width, sizes.hidden, eps) for _ in range(depth))
        self.large_pos_embed = nn.Parameter(torch.empty(1, sizes.patches // 4, sizes.width))
        self.alpha = nn.Parameter(torch.empty(1))
        self.belta = nn.Parameter(torch.empty(1))  # the published spelling

    def positions(self) -> Tensor:
        """[1, S, D]: the positions of one tower, plus the position of each patch's 2x2 cell."""
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


class MfasEncoder(SpaceTimeEncoder):
    """MFAS's lower half; its `PatchTokens` include those of the coarse tower."""

    def __init__(self, trunk: TwoTowers, sizes: VideoSizes, variant: Variant) -> None:
        super().__init__(trunk, sizes)
        self.variant = variant
        self.coarse = (sizes.grid[0] // 2) * (sizes.grid[1] // 2)

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> PatchTokens:
        """[B, T, 3, size, size] to fine and coarse tokens; errors as in `VideoEncoder.forward`."""
        self.check(frames)
        self.pack()
        assert isinstance(self.trunk, TwoTowers)
        fine, coarse, over_fine, over_coarse = self.trunk.encode(frames.to(self.trunk.pos_embed.dtype))
        t = frames.shape[1]
        cut = slice(0, -1) if self.variant == "released" else slice(1, None)
        return PatchTokens(
            cls=fine[:, 0],
            patches=rearrange(fine[:, 1:], "b (t n) d -> b t n d", t=t),
            saliency=rearrange(over_fine[:, cut], "b (t n) -> b t n", t=t),
            coarse=rearrange(coarse[:, 1:], "b (t m) d -> b t m d", t=t),
            coarse_saliency=rearrange(over_coarse[:, cut], "b (t m) -> b t m", t=t),
        )


def build_video(checkpoint: Checkpoint, options: VideoOptions) -> MfasEncoder:
    """The two towers down to `options.depth`, on the question-answering path.

    From an EgoVLPv2 checkpoint the coarse tower starts as a copy of the fine one, and the cell positions and both
    gates start at zero.

    Args:
        checkpoint: Checkpoint of MFAS or EgoVLPv2.
        options: Temporal positions are interpolated if the checkpoint has fewer.

    Raises:
        CheckpointError: Another network's checkpoint; a missing or misshapen tensor; a depth that is out of range; or
            a grid with odd sides.
    """
    checkpoint.require("mfas", "egovlpv2")
    sizes = VideoSizes.of(checkpoint)
    depth = options.depth
    check_depth(depth, sizes.fusion, "where the question enters", checkpoint)
    if sizes.grid[0] % 2:
        raise CheckpointError(
            f"{checkpoint.path}: the patch grid is {sizes.grid}; MFAS pools 2x2 patches, so both sides must be even"
        )
    with torch.device("meta"):
        trunk = TwoTowers(sizes, depth, BLOCK_EPS)
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


NETWORK = Network("mfas", build_video, build_roberta)
