"""The rest of the published networks: the fused upper half and the classifier, on cached tokens and text states.

Encoder, text network and this head together are the published network, cut in two at the block where the question
enters. Shape legend as in `fused_layers`; A answers.
"""

from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from egopatch.extract.encoders.layers.video_encoder import VideoSizes
from egopatch.extract.encoders.networks.egovlpv2 import BLOCK_EPS, FUSED_NORM_EPS
from egopatch.extract.encoders.networks.mfas import Variant, pool2x2
from egopatch.features.values.spec import PatchTokens
from egopatch.train.heads.fused.layers import FusedBlock, FusedTextLayer

DROPOUT = 0.2  # published, before the last layer
TOP: dict[Variant, int] = {"paper": 3, "released": 1}


class FusedHead(nn.Module):
    """EgoVLPv2 from its first fused block to the answer.

    The last text layer is left out, because nothing reads its states; so are, in the last video block, all outputs
    but CLS.

    Args:
        width: D.
        hidden: of the MLPs.
        blocks: fused blocks.
        answers: A.

    Attributes:
        width: D.
    """

    def __init__(self, width: int, hidden: int, blocks: int, answers: int) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(FusedBlock(width, hidden, BLOCK_EPS) for _ in range(blocks))
        self.layers = nn.ModuleList(FusedTextLayer(width, hidden, BLOCK_EPS) for _ in range(blocks - 1))
        self.norm = nn.LayerNorm(width, FUSED_NORM_EPS)
        self.dropout: nn.Module = nn.Dropout(DROPOUT)
        self.projector_1 = nn.Linear(width, answers)
        self.projector_2 = nn.Linear(answers, answers)

    def forward(
        self, tokens: PatchTokens, text_states: Tensor, attention_mask: Tensor, clip_index: Tensor | None = None
    ) -> Tensor:
        """Answer questions.

        Args:
            tokens: of B clips, tapped where fusion starts; of C clips with `clip_index`.
            text_states: [B, L, D], tapped at the same depth.
            attention_mask: [B, L], nonzero on tokens.
            clip_index: [B] long, the clip each question asks about.

        Returns:
            logits [B, A].

        Raises:
            ValueError: tokens or states of another width than the network's.
        """
        for name, got in (("patches", tokens.patches.shape[-1]), ("text_states", text_states.shape[-1])):
            if got != self.width:
                raise ValueError(f"{name} is {got} wide; this head's network is {self.width} wide")
        dtype = self.norm.weight.dtype
        x = torch.cat([tokens.cls[:, None].to(dtype), tokens.patches.flatten(1, 2).to(dtype)], dim=1)
        mask = attention_mask.bool()[:, None, None]
        return self.classify(self.fuse(x, tokens, text_states.to(dtype), mask, clip_index))

    def fuse(self, x: Tensor, tokens: PatchTokens, text: Tensor, mask: Tensor, clip_index: Tensor | None) -> Tensor:
        """CLS [B, D] after the last fused block, from `x` [C or B, S, D]."""
        frames = tokens.patches.shape[1]
        *blocks, last = cast("list[FusedBlock]", list(self.blocks))
        for block, layer in zip(blocks, self.layers, strict=True):
            # Both halves read the state that enters the block.
            fused = block.fuse(x, frames, text, mask, clip_index)
            text = layer(text, mask, x, clip_index)
            x, clip_index = fused, None
        return last.fuse_cls(x, frames, text, mask, clip_index)[:, 0]

    def classify(self, cls: Tensor) -> Tensor:
        """[B, D] to logits [B, A]."""
        return self.projector_2(self.dropout(F.relu(self.projector_1(self.norm(cls)))))


class MfasHead(FusedHead):
    """MFAS from its patch selection to the answer: selected patches only, pooled patch -> frame -> video.

    The last three blocks see 2x2-pooled patches, frames, and the video; the ones before see every kept patch.

    Args:
        width, hidden, blocks, answers: as for `FusedHead`.
        variant: `paper` lets the 3 best patches of a frame grow the kept region, `released` the best one.
    """

    def __init__(self, width: int, hidden: int, blocks: int, answers: int, variant: Variant = "paper") -> None:
        super().__init__(width, hidden, blocks, answers)
        self.top = TOP[variant]

    def fuse(self, x: Tensor, tokens: PatchTokens, text: Tensor, mask: Tensor, clip_index: Tensor | None) -> Tensor:
        """CLS [B, D] after the last block; see `FusedHead.fuse`.

        Raises:
            ValueError: the tokens have no coarse tower.
        """
        if tokens.coarse_saliency is None:
            raise ValueError("tokens have no coarse saliency; extract them with encoder.arch mfas")
        frames = tokens.patches.shape[1]
        kept = select_patches(score_patches(tokens.saliency, tokens.coarse_saliency), self.top)
        keep = F.pad(kept.flatten(1), (1, 0), value=True)[..., None]  # [C, S, 1], CLS first
        *blocks, last = cast("list[FusedBlock]", list(self.blocks))
        for i, block in enumerate(blocks):
            left = len(blocks) - i
            if left == 2:
                x, keep = pool2x2(x, frames), pool2x2(keep, frames)
            elif left == 1:
                x, keep = _pool(x, frames), _pool(keep, frames)
            fused = block.fuse(x, frames, text, mask, clip_index, keep[..., 0])
            text = self.layers[i](text, mask, x, clip_index)
            if clip_index is not None:
                keep, clip_index = keep[clip_index], None
            x = fused
        x, keep = _pool(x, 1), _pool(keep, 1)
        return last.fuse_cls(x, 1, text, mask, clip_index, keep[..., 0])[:, 0]


def score_patches(saliency: Tensor, coarse_saliency: Tensor) -> Tensor:
    """MFAS's ranking of a frame's patches [B, T, N]: the softmax of either tower's map over the frame, added.

    Args:
        saliency: [B, T, N], N on a square grid.
        coarse_saliency: [B, T, N/4].
    """
    side = round(coarse_saliency.shape[2] ** 0.5)
    large = coarse_saliency.unflatten(2, (side, 1, side, 1)).expand(-1, -1, -1, 2, -1, 2).flatten(2)
    return saliency.softmax(dim=-1) + large.softmax(dim=-1)


def select_patches(score: Tensor, top: int) -> Tensor:
    """MFAS's kept patches [B, T, N] bool.

    The region starts as the lower middle of the frame (rows 4-13 and columns 2-11 of 14x14), where hands and what
    they hold are. Frame by frame, those of the `top` highest patches that touch it (4-neighbours) join it for good.

    Args:
        score: [B, T, N], N on a square grid.
        top: patches a frame that may join.
    """
    side = round(score.shape[2] ** 0.5)
    margin = max(1, side // 7)
    start = torch.zeros(side, side, dtype=torch.bool, device=score.device)
    start[2 * margin :, margin : side - margin] = True
    return grow_region(score, start, top)


def grow_region(score: Tensor, start: Tensor, top: int) -> Tensor:
    """The region of each frame [B, T, N] bool that begins as `start` and takes in, frame by frame, high neighbours.

    Args:
        score: [B, T, N].
        start: [rows, cols] bool, rows * cols = N.
        top: patches a frame that may join.
    """
    b, frames, _ = score.shape
    rows, cols = start.shape
    stride = cols + 2  # a border of one, so that every patch has four neighbours
    region = torch.zeros(b, rows + 2, stride, dtype=torch.bool, device=score.device)
    region[:, 1:-1, 1:-1] = start
    best = score.topk(top, dim=2).indices
    place = (best // cols + 1) * stride + best % cols + 1  # [B, T, top] in the bordered grid
    flat = region.view(b, -1)
    kept = []
    for t in range(frames):
        joins = flat.gather(1, place[:, t])
        for offset in (-stride, stride, -1, 1):
            joins = joins | flat.gather(1, place[:, t] + offset)
        flat = flat.scatter(1, place[:, t], joins)
        kept.append(flat.view(b, rows + 2, stride)[:, 1:-1, 1:-1].flatten(1))
    return torch.stack(kept, dim=1)


def _pool(x: Tensor, groups: int) -> Tensor:
    """Max of each of `groups` equal runs of tokens in `x` [B, S, D], CLS kept; [B, 1 + groups, D]."""
    return torch.cat([x[:, :1], x[:, 1:].unflatten(1, (groups, -1)).amax(dim=2)], dim=1)


def load_head(
    arch: Literal["egovlpv2", "mfas"],
    checkpoint: Path | str | Checkpoint,
    answers: int | None = None,
    variant: Variant = "paper",
) -> FusedHead:
    """The head that continues a published network where its encoders stop.

    Args:
        arch: the network.
        checkpoint: file, or one already read.
        answers: A. None takes the checkpoint's classifier. A classifier of another width, or none (pretraining),
            is replaced by a fresh one.
        variant: MFAS only; see `extract.encoders.networks.mfas`.

    Returns:
        In evaluation mode; call `train()` to fine-tune it.

    Raises:
        CheckpointError: unreadable, another network's, lacking what this half needs, or without a classifier where
            `answers` is None.
        ValueError: an `arch` without a fused half.
    """
    if arch not in ("egovlpv2", "mfas"):
        raise ValueError(f"arch is {arch!r}, which has no fused half; expected egovlpv2 or mfas")
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    loaded.require(*(("egovlpv2",) if arch == "egovlpv2" else ("egovlpv2", "mfas")))
    sizes = VideoSizes.of(loaded)
    if sizes.fusion == sizes.blocks:
        raise CheckpointError(f"{loaded.path}: none of its {sizes.blocks} video blocks is fused; expected some")
    classifier = loaded.tensors.get("projector_2.weight")
    known = None if classifier is None else classifier.shape[0]
    if answers is None and known is None:
        raise CheckpointError(f"{loaded.path}: has no classifier (pretraining); give answers to start a fresh one")
    shape = (sizes.width, sizes.hidden, sizes.blocks - sizes.fusion, answers or known or 0)
    head = FusedHead(*shape) if arch == "egovlpv2" else MfasHead(*shape, variant)
    for i, block in enumerate(head.blocks):
        prefix = f"video_model.blocks.{sizes.fusion + i}."
        # What reads the text is part of the space attention in the published module.
        loaded.fill(block, {name: prefix + name.replace("text.", "attn.") for name in block.state_dict()})
    for i, layer in enumerate(cast("list[FusedTextLayer]", list(head.layers))):
        loaded.fill(layer, layer.published_names(f"text_model.encoder.layer.{sizes.fusion + i}."))
    loaded.fill(head.norm, "norm.")
    if known == head.projector_2.out_features:
        loaded.fill(head.projector_1, "projector_1.")
        loaded.fill(head.projector_2, "projector_2.")
    return head.eval()
