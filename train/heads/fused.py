"""The rest of the published networks: the fused upper half and the classifier, on cached tokens and text states.

Encoder, text network and this head together are the published network, cut in two at the block where the question
enters. Shape legend as in `fused_layers`; A answers.
"""

from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from extract.encoders.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from extract.encoders.egovlpv2 import BLOCK_EPS, FUSED_NORM_EPS
from extract.encoders.video_encoder import VideoSizes
from features.spec import PatchTokens
from train.heads.fused_layers import FusedBlock, FusedTextLayer

DROPOUT = 0.2  # published, before the last layer


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
        self.dropout = nn.Dropout(DROPOUT)
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


def load_head(arch: Literal["egovlpv2"], checkpoint: Path | str | Checkpoint, answers: int | None = None) -> FusedHead:
    """The head that continues a published network where its encoders stop.

    Args:
        arch: the network.
        checkpoint: file, or one already read.
        answers: A. None takes the checkpoint's classifier. A classifier of another width, or none (pretraining),
            is replaced by a fresh one.

    Returns:
        In evaluation mode; call `train()` to fine-tune it.

    Raises:
        CheckpointError: unreadable, another network's, lacking what this half needs, or without a classifier where
            `answers` is None.
        ValueError: an `arch` without a fused half.
    """
    if arch != "egovlpv2":
        raise ValueError(f"arch is {arch!r}, which has no fused half; expected egovlpv2")
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    loaded.require("egovlpv2", "mfas")
    sizes = VideoSizes.of(loaded)
    if sizes.fusion == sizes.blocks:
        raise CheckpointError(f"{loaded.path}: none of its {sizes.blocks} video blocks is fused; expected some")
    classifier = loaded.tensors.get("projector_2.weight")
    known = None if classifier is None else classifier.shape[0]
    if answers is None and known is None:
        raise CheckpointError(f"{loaded.path}: has no classifier (pretraining); give answers to start a fresh one")
    head = FusedHead(sizes.width, sizes.hidden, sizes.blocks - sizes.fusion, answers or known or 0)
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
