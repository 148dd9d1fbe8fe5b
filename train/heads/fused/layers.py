"""Layers of the fused upper half: video blocks that attend to text, and text layers that attend to video.

Shape legend: C clips, B questions, S = 1 + T*N video tokens (CLS first), L text tokens, D channels, H heads of 64.
`clip_index` [B] is the clip of each question; everything that does not depend on the question is computed once a clip.
"""

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.extract.encoders.layers.spacetime import HEAD_WIDTH, SpaceTimeBlock


def split_heads(x: Tensor) -> Tensor:
    """[B, tokens, H*64] to [B, H, tokens, 64]."""
    return rearrange(x, "b n (h d) -> b h n d", d=HEAD_WIDTH)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, tokens, 64] to [B, tokens, H*64]."""
    return rearrange(x, "b h n d -> b n (h d)")


class TextToVideo(nn.Module):
    """A gated attention of video tokens to the question, added to a block's space attention."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.qkv_text_i2t = nn.Linear(width, 2 * width)
        self.qkv_i2t = nn.Linear(width, width)
        self.proj_i2t = nn.Linear(width, width)
        self.norm_i2t_i = nn.LayerNorm(width, eps)
        self.alpha_i2t = nn.Parameter(torch.zeros(1))

    def forward(self, spaced: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """`spaced` [B, tokens, D] plus its attention to `text` [B, L, D]; `text_mask` is [B, 1, 1, L]."""
        query = split_heads(self.qkv_i2t(self.norm_i2t_i(spaced)))
        key, value = (split_heads(part) for part in self.qkv_text_i2t(text).chunk(2, dim=-1))
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=text_mask)
        return spaced + self.alpha_i2t * self.proj_i2t(merge_heads(read))


class FusedBlock(SpaceTimeBlock):
    """A space-time block whose space attention also attends to the question."""

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__(width, hidden, eps)
        self.text = TextToVideo(width, eps)

    def fuse(
        self,
        x: Tensor,
        frames: int,
        text: Tensor,
        text_mask: Tensor,
        clip_index: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """The whole block.

        Args:
            x: [C, S, D], or [B, S, D] if `clip_index` is None.
            frames: T.
            text: [B, L, D], the states that enter this block's text layer.
            text_mask: [B, 1, 1, L], true on tokens.
            clip_index: [B]; None if `x` already has one row a question.
            keep: [C or B, S] bool, tokens that space attention may attend to.

        Returns:
            [B, S, D].
        """
        timed, _ = self.timeattn(self.norm3(x), frames, "time", residual=x)
        spaced = self.attn(self.norm1(timed), frames, "space", keep)[0]
        if clip_index is not None:
            x, spaced = x.index_select(0, clip_index), spaced.index_select(0, clip_index)
        x = x + self.text(spaced, text, text_mask)
        return self.mlp(self.norm2(x), residual=x)

    def fuse_cls(
        self,
        x: Tensor,
        frames: int,
        text: Tensor,
        text_mask: Tensor,
        clip_index: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """CLS of `fuse`'s result, [B, 1, D], at a fraction of the cost; for the last block, whose patches are unused.

        It does not need the keys and values of every token; see `Attention.attend_cls`.
        """
        timed, _ = self.timeattn(self.norm3(x), frames, "time", residual=x)
        spaced = self.attn.proj(self.attn.attend_cls(self.norm1(timed), keep)[0])[:, None]
        first = x[:, :1]
        if clip_index is not None:
            first, spaced = first.index_select(0, clip_index), spaced.index_select(0, clip_index)
        first = first + self.text(spaced, text, text_mask)
        return self.mlp(self.norm2(first), residual=first)


class CrossAttention(nn.Module):
    """Attention of text over `source`, text itself or video; one head is 64 wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)

    def forward(
        self, text: Tensor, source: Tensor, mask: Tensor | None = None, clip_index: Tensor | None = None
    ) -> Tensor:
        """`text` [B, L, D] over `source` [B, tokens, D], or [C, tokens, D] with `clip_index` [B]; returns [B, L, D]."""
        query, key, value = (
            split_heads(self.query(text)),
            split_heads(self.key(source)),
            split_heads(self.value(source)),
        )
        if clip_index is not None:
            key, value = key.index_select(0, clip_index), value.index_select(0, clip_index)
        return self.dense(merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))


class FusedTextLayer(nn.Module):
    """A RoBERTa layer that also attends to the video tokens entering its video block, through a gate."""

    # Names in the checkpoint, below `text_model.encoder.layer.<i>.`
    CHECKPOINT_NAMES: ClassVar[dict[str, str]] = {
        "own.dense": "attention.output.dense",
        "own": "attention.self",
        "video.dense": "crossattention_t2i.output.dense",
        "video": "crossattention_t2i.self",
        "gate": "alpha_t2i",
        "norm": "attention.output.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "last_norm": "output.LayerNorm",
    }

    def __init__(self, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.own = CrossAttention(width)
        self.video = CrossAttention(width)
        self.gate = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.last_norm = nn.LayerNorm(width, eps)

    def forward(self, text: Tensor, text_mask: Tensor, video: Tensor, clip_index: Tensor | None = None) -> Tensor:
        """Maps `text` [B, L, D] to [B, L, D]; `video` is [C or B, S, D], the rest as in `FusedBlock.fuse`."""
        attended = self.own(text, text, text_mask)
        attended = attended + self.gate * self.video(attended, video, clip_index=clip_index)
        text = self.norm(attended + text)
        return self.last_norm(self.fc2(F.gelu(self.fc1(text))) + text)

    def published_names(self, prefix: str) -> dict[str, str]:
        """This layer's parameter names mapped to those of the checkpoint, which begin with `prefix`."""
        names = {}
        for name in self.state_dict():
            part = max((p for p in self.CHECKPOINT_NAMES if name == p or name.startswith(f"{p}.")), key=len)
            names[name] = f"{prefix}{self.CHECKPOINT_NAMES[part]}{name.removeprefix(part)}"
        return names
