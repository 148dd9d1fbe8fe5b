"""What every light head shares: reading the question, its sizes, and the answer classifier.

Shape legend: B questions, L text tokens, D text channels, W hidden width, A answers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """What a head must fit.

    Attributes:
        frames: T.
        grid: (rows, cols) of the patch grid.
        width: channels of the patch tokens.
        text_width: channels of the text states.
        answers: A, classes.
    """

    frames: int
    grid: tuple[int, int]
    width: int
    text_width: int
    answers: int


class QuestionReader(nn.Module):
    """Text states to one vector: a self-attention layer over the words, then pooling by learned attention.

    Args:
        text_width: channels of the states.
        width: W, of the result.
        heads: attention heads.
        dropout: on the states and inside the layer.
    """

    def __init__(self, text_width: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(text_width), nn.Dropout(dropout), nn.Linear(text_width, width))
        self.mix = Block(width, heads, dropout)
        self.pool = nn.Linear(width, heads)
        self.out = nn.Linear(heads * width, width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """[B, L, D] and [B, L] bool, true on tokens, to [B, W]."""
        words = self.mix(self.project(states.float()), mask)
        scores = self.pool(words).masked_fill(~mask[..., None], -torch.inf)
        pooled = torch.einsum("blh,blw->bhw", scores.softmax(dim=1), words)
        return self.out(pooled.flatten(1))


class Block(nn.Module):
    """A pre-norm transformer layer with a padding mask."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, L, W] to the same; `mask` [B, L] is true on what may be attended to."""
        b, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        allowed = None if mask is None else mask[:, None, None]
        seen = nn.functional.scaled_dot_product_attention(q, k, v, allowed)
        x = x + self.dropout(self.proj(seen.transpose(1, 2).reshape(b, length, width)))
        return x + self.dropout(self.mlp(x))


class Classifier(nn.Sequential):
    """Features to answer logits: norm, dropout, a hidden layer, dropout, answers."""

    def __init__(self, features: int, width: int, answers: int, dropout: float) -> None:
        last = nn.Linear(width, answers)
        nn.init.zeros_(last.bias)
        nn.init.normal_(last.weight, std=0.02)
        super().__init__(
            nn.LayerNorm(features),
            nn.Dropout(dropout),
            nn.Linear(features, width),
            nn.GELU(),
            nn.Dropout(dropout),
            last,
        )


class Standardise(nn.Module):
    """Channel-wise standardisation by constants measured once on training clips.

    The constants are affine, so attention over raw tokens can absorb them (`absorb`, and `forward` on what it pooled,
    since attention weights sum to one).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    @torch.no_grad()
    def measure(self, rows: Tensor) -> None:
        """Take the constants from [..., D] samples."""
        flat = rows.reshape(-1, rows.shape[-1]).float()
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0).clamp_min(1e-4))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same, in float32."""
        return (x.float() - self.mean) / self.std

    def absorb(self, query: Tensor) -> Tensor:
        """The query on raw tokens that scores them as `query` scores standardised ones, up to a constant."""
        return query / self.std
