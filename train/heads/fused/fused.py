"""The upper half of the published networks: fused blocks and classifier, on cached tokens and text states.

Video encoder, text encoder and this head together are the published network, cut in two at the first fused block.
Shape legend as in `layers`; A answers.
"""

from pathlib import Path
from typing import Literal, cast

import torch
from einops import reduce, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from egopatch.extract.encoders.layers.spacetime import VideoSizes
from egopatch.extract.encoders.networks.egovlpv2 import BLOCK_EPS, FUSED_NORM_EPS
from egopatch.extract.encoders.networks.mfas import Variant, pool2x2
from egopatch.features import PatchTokens
from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.noise import Dropout
from egopatch.train.heads.common.region import grow_region
from egopatch.train.heads.common.scale import scaled_patches
from egopatch.train.heads.fused.layers import FusedBlock, FusedTextLayer

# Dropout before the last layer, as published.
DROPOUT = 0.2
# Patches a frame that may join the kept region of MFAS.
TOP: dict[Variant, int] = {"paper": 3, "released": 1}


class FusedHead(nn.Module):
    """EgoVLPv2 from its first fused block to the answer.

    The last text layer is omitted because nothing reads its states. The last video block computes only CLS, for the
    same reason.

    Args:
        width: Channels of a token, D.
        hidden: Width of the MLPs.
        blocks: Number of fused blocks.
        answers: A, number of classes.
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
            tokens: Tokens of B clips at the depth where fusion starts; of C clips with `clip_index`.
            text_states: [B, L, D], states at the same depth.
            attention_mask: [B, L], nonzero on tokens.
            clip_index: [B] long, the clip of each question.

        Returns:
            logits [B, A].

        Raises:
            ValueError: Tokens or states have another width than the network.
        """
        for name, got in (("patches", tokens.patches.shape[-1]), ("text_states", text_states.shape[-1])):
            if got != self.width:
                raise ValueError(
                    f"{name} has {got} channels; expected {self.width}, the width of this head's network: use a store "
                    "that was encoded with its checkpoint"
                )
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

    The last three blocks read 2x2-pooled patches, frames, and the video; the earlier ones read every kept patch.

    Args:
        width, hidden, blocks, answers: As for `FusedHead`.
        variant: `paper` lets the 3 best patches of a frame grow the kept region, `released` only the best one.
    """

    def __init__(self, width: int, hidden: int, blocks: int, answers: int, variant: Variant = "paper") -> None:
        super().__init__(width, hidden, blocks, answers)
        self.top = TOP[variant]

    def fuse(self, x: Tensor, tokens: PatchTokens, text: Tensor, mask: Tensor, clip_index: Tensor | None) -> Tensor:
        """CLS [B, D] after the last block; see `FusedHead.fuse`.

        Raises:
            ValueError: The tokens have no coarse saliency.
        """
        if tokens.coarse_saliency is None:
            raise ValueError("tokens have no coarse saliency; encode the clips with encoder.arch mfas")
        frames = tokens.patches.shape[1]
        kept = select_patches(score_patches(tokens.saliency, tokens.coarse_saliency), self.top)
        keep = F.pad(kept.flatten(1), (1, 0), value=True)[..., None]  # [C, S, 1], CLS first
        *blocks, last = cast("list[FusedBlock]", list(self.blocks))
        for i, block in enumerate(blocks):
            remaining = len(blocks) - i
            if remaining == 2:
                x, keep = pool2x2(x, frames), pool2x2(keep, frames)
            elif remaining == 1:
                x, keep = _pool(x, frames), _pool(keep, frames)
            fused = block.fuse(x, frames, text, mask, clip_index, keep[..., 0])
            text = self.layers[i](text, mask, x, clip_index)
            if clip_index is not None:
                keep, clip_index = keep[clip_index], None
            x = fused
        x, keep = _pool(x, 1), _pool(keep, 1)
        return last.fuse_cls(x, 1, text, mask, clip_index, keep[..., 0])[:, 0]


def score_patches(saliency: Tensor, coarse_saliency: Tensor) -> Tensor:
    """MFAS's score of a frame's patches [C, T, N]: the sum of both towers' saliency, each a softmax over the frame.

    Args:
        saliency: [C, T, N], N on a square grid.
        coarse_saliency: [C, T, N/4].
    """
    rows = round(coarse_saliency.shape[2] ** 0.5)
    large = repeat(coarse_saliency, "c t (rows cols) -> c t (rows i cols j)", rows=rows, i=2, j=2)
    return saliency.softmax(dim=-1) + large.softmax(dim=-1)


def select_patches(score: Tensor, top: int) -> Tensor:
    """MFAS's kept patches [C, T, N] bool.

    The region starts as the lower middle of the frame (rows 4-13 and columns 2-11 of 14x14), where hands and the
    objects in them are, and grows as `grow_region` describes.

    Args:
        score: [C, T, N], N on a square grid.
        top: Number of patches a frame that may join.
    """
    side = round(score.shape[2] ** 0.5)
    margin = max(1, side // 7)
    start = torch.zeros(side, side, dtype=torch.bool, device=score.device)
    start[2 * margin :, margin : side - margin] = True
    return grow_region(score, start, top)


def _pool(x: Tensor, groups: int) -> Tensor:
    """Max of each of `groups` equal runs of tokens in `x` [B, S, D], CLS kept; [B, 1 + groups, D]."""
    return torch.cat([x[:, :1], reduce(x[:, 1:], "b (g n) d -> b g d", "max", g=groups)], dim=1)


class FusedSystem(nn.Module):
    """A fused head on training batches of cached tokens: every question is fused with its own clip."""

    def __init__(self, network: FusedHead) -> None:
        super().__init__()
        self.network = network
        # torch's own dropout draws from a global state that a resumed run could not restore.
        network.dropout = Dropout(DROPOUT)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        stored = batch.tokens
        # The upper half reads only the saliency of the coarse tower.
        tokens = PatchTokens(
            stored.cls, scaled_patches(stored), stored.saliency, coarse_saliency=stored.coarse_saliency
        )
        states, mask = batch.states.float()[batch.text_index], batch.mask[batch.text_index]
        return self.network(tokens, states, mask, batch.clip_index)


def load_head(
    arch: Literal["egovlpv2", "mfas"],
    checkpoint: Path | str | Checkpoint,
    answers: int | None = None,
    variant: Variant = "paper",
) -> FusedHead:
    """The head that continues a published network where its encoders stop.

    Args:
        arch: Name of the network.
        checkpoint: Path of the file, or a checkpoint already read.
        answers: A, number of classes; None uses that of the checkpoint's classifier. If the checkpoint has no
            classifier (pretraining) or one with another number of classes, a new one is initialised.
        variant: MFAS only; see `extract.encoders.networks.mfas`.

    Returns:
        The head in evaluation mode; call `train()` to fine-tune it.

    Raises:
        CheckpointError: The checkpoint is unreadable, another network's or incomplete, or it has no classifier and
            `answers` is None.
        ValueError: `arch` has no fused half.
    """
    if arch not in ("egovlpv2", "mfas"):
        raise ValueError(f"arch is {arch!r}, which has no fused half; expected egovlpv2 or mfas")
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    networks = ("egovlpv2",) if arch == "egovlpv2" else ("egovlpv2", "mfas")
    loaded.require(*networks)
    sizes = VideoSizes.of(loaded)
    if sizes.fusion == sizes.blocks:
        raise CheckpointError(f"{loaded.path}: none of its {sizes.blocks} video blocks is fused; expected fused blocks")
    classifier = loaded.tensors.get("projector_2.weight")
    known = None if classifier is None else classifier.shape[0]
    if answers is None and known is None:
        raise CheckpointError(f"{loaded.path}: has no classifier (pretraining); pass answers to initialise a new one")
    shape = (sizes.width, sizes.hidden, sizes.blocks - sizes.fusion, answers or known or 0)
    head = FusedHead(*shape) if arch == "egovlpv2" else MfasHead(*shape, variant)
    for i, block in enumerate(head.blocks):
        prefix = f"video_model.blocks.{sizes.fusion + i}."
        # In the published module, the attention to text is part of the space attention.
        loaded.fill(block, {name: prefix + name.replace("text.", "attn.") for name in block.state_dict()})
    for i, layer in enumerate(cast("list[FusedTextLayer]", list(head.layers))):
        loaded.fill(layer, layer.published_names(f"text_model.encoder.layer.{sizes.fusion + i}."))
    loaded.fill(head.norm, "norm.")
    if known == head.projector_2.out_features:
        loaded.fill(head.projector_1, "projector_1.")
        loaded.fill(head.projector_2, "projector_2.")
    return head.eval()
