"""Parts of every light head: the question reader, whitening, the answer classifier, and the sizes to fit.

Shape legend: B questions, U unique texts, L text tokens, D text channels, W hidden width, A answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from egopatch.train.heads.common.noise import Dropout

TEXT_SHRINKAGE = 0.1
# Gain of the initial query and key weights: with the default ones, attention stays uniform for hundreds of steps.
ATTENTION_GAIN = math.sqrt(3)
# Samples that suffice for a covariance of 768 channels; all tokens of a few hundred clips would take gigabytes.
MEASURED_ROWS = 2**15


@dataclass(frozen=True)
class Sizes:
    """Sizes of the features and of the answer set that a head must fit.

    Attributes:
        frames: T, frames of a clip.
        grid: (rows, cols) of the patch grid of a whole frame.
        patches: Number of stored patches of a frame; rows * cols, or fewer in a derived store.
        width: Channels of the patch tokens.
        text_width: Channels of the text states.
        answers: A, number of classes.
        choices: K, largest number of options of multiple-choice questions; 0 for other questions.
    """

    frames: int
    grid: tuple[int, int]
    patches: int
    width: int
    text_width: int
    answers: int
    choices: int = 0


def absorb_key(queries: Tensor, key: nn.Linear, heads: int) -> Tensor:
    """Queries [U, W], H heads of W / H, with the key projection and the scale of dot products absorbed: [U, H, D]."""
    by_head = rearrange(key.weight, "(h e) d -> h e d", h=heads)
    queries = rearrange(full_precision(queries), "u (h e) -> u h e", h=heads) / math.sqrt(by_head.shape[1])
    with without_autocast(queries):
        return torch.einsum("uhe,hed->uhd", queries, by_head)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Context for maps that are absorbed into queries: bfloat16 would round away the small differences of scores."""
    return torch.autocast(tensor.device.type, enabled=False)


def full_precision(tensor: Tensor) -> Tensor:
    """`tensor` in float32; a float64 tensor is returned unchanged."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def with_gain(linear: nn.Linear, gain: float) -> nn.Linear:
    """`linear` with its initial weights multiplied by `gain`."""
    with torch.no_grad():
        linear.weight *= gain
    return linear


class QuestionReader(nn.Module):
    """Pools text states to one vector: attention with a learned score per head, then a hidden layer and its norm.

    Args:
        text_width: D, channels of the states.
        width: W, channels of the result.
        heads: Number of pooled vectors.
        dropout: Dropout probability on the result.
    """

    def __init__(self, text_width: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.whiten = Whitening(text_width, TEXT_SHRINKAGE)
        self.score = nn.Linear(text_width, heads, bias=False)
        self.out = nn.Sequential(
            nn.LayerNorm(heads * text_width),
            nn.Linear(heads * text_width, width),
            nn.GELU(),
            nn.LayerNorm(width),
            Dropout(dropout, over="texts"),
        )

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Vectors [U, W] from states [U, L, D] and mask [U, L] bool, true on tokens."""
        return read_together([self], states, mask)[0]


def read_together(readers: Sequence[QuestionReader], states: Tensor, mask: Tensor) -> list[Tensor]:
    """Each reader's vectors [U, W] of the same texts, states [U, L, D] and mask [U, L] bool, true on tokens.

    The readers attend over the words in one operation, with the whitening of the first: all were measured on the same
    texts. Shape legend: R readers, H vectors of each.
    """
    words, whiten = states.float(), readers[0].whiten
    queries = torch.stack([reader.score.weight for reader in readers])
    weights = words @ whiten.absorb(queries).flatten(0, 1).T
    weights = weights.masked_fill(~mask[..., None], -torch.inf).softmax(dim=1)
    pooled = rearrange(weights.transpose(1, 2) @ words, "u (r h) d -> r u (h d)", r=len(readers))
    whitened = whiten(pooled.unflatten(2, (-1, words.shape[2]))).flatten(2)
    return [reader.out(vectors) for reader, vectors in zip(readers, whitened.unbind(0), strict=True)]


class Classifier(nn.Sequential):
    """Features to answer logits: norm, dropout, a hidden layer, dropout, answers."""

    def __init__(self, features: int, width: int, answers: int, dropout: float) -> None:
        last = nn.Linear(width, answers)
        nn.init.zeros_(last.bias)
        nn.init.normal_(last.weight, std=0.02)
        super().__init__(
            nn.LayerNorm(features),
            Dropout(dropout),
            nn.Linear(features, width),
            nn.GELU(),
            Dropout(dropout),
            last,
        )


class Whitening(nn.Module):
    """ZCA whitening with shrinkage: an affine map, estimated once on training features.

    Frozen features share a few directions of large variance, which hide the differences between them. Directions are
    scaled by 1 / sqrt(variance + `shrinkage` * mean variance), so that those of small variance are not blown up.
    Because the map is affine, attention over raw tokens can absorb it (`absorb`), and it can follow a weighted mean of
    raw tokens, whose weights sum to one.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int, shrinkage: float) -> None:
        super().__init__()
        self.shrinkage = shrinkage
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    @torch.no_grad()
    def measure(self, rows: Tensor) -> None:
        """Estimate the map from samples [..., D]; if there are many, from an evenly spaced subset."""
        flat = rows.reshape(-1, rows.shape[-1])
        flat = flat[:: max(1, len(flat) // MEASURED_ROWS)].double()
        self.mean.copy_(flat.mean(0))
        # One sample has no covariance.
        covariance = torch.cov(flat.T) if len(flat) > 1 else flat.new_zeros(flat.shape[1], flat.shape[1])
        values, directions = torch.linalg.eigh(covariance)
        floor = self.shrinkage * values.mean()
        scale = (values.clamp_min(0) + floor).clamp_min(1e-12).rsqrt()
        self.matrix.copy_((directions * scale) @ directions.T)

    def forward(self, x: Tensor) -> Tensor:
        """Whitened [..., D] in float32."""
        return self.absorb(x.float() - self.mean)

    def absorb(self, query: Tensor) -> Tensor:
        """The query that scores raw tokens as `query` scores whitened ones, up to a constant."""
        # As one matrix: under vmap, a product with more dimensions would copy the map for each of them.
        with without_autocast(query):
            return (full_precision(query).reshape(-1, query.shape[-1]) @ self.matrix).view(query.shape)

    def then(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer whose output on raw tokens equals that of `linear` on whitened ones."""
        with without_autocast(self.matrix):
            weight = linear.weight @ self.matrix
            return weight, torch.addmv(linear.bias, weight, self.mean, alpha=-1)
