"""What every light head shares: reading the question, its sizes, and the answer classifier.

Shape legend: B questions, U unique texts, L text tokens, D text channels, W hidden width, A answers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from egopatch.train.heads.common.noise import Dropout

TEXT_SOFTNESS = 0.1
# Of queries and keys: with default weights all patches would weigh alike for hundreds of steps.
ATTENTION_GAIN = math.sqrt(3)
# Samples that suffice for a covariance of 768 channels; all tokens of a few hundred clips would take gigabytes.
MEASURED_ROWS = 2**15


@dataclass(frozen=True)
class Sizes:
    """What a head must fit.

    Attributes:
        frames: T.
        grid: (rows, cols) of the patch grid of a whole frame.
        patches: kept of a frame in the store; rows * cols, or fewer in a derived store.
        width: channels of the patch tokens.
        text_width: channels of the text states.
        answers: A, classes.
    """

    frames: int
    grid: tuple[int, int]
    patches: int
    width: int
    text_width: int
    answers: int


def absorb_key(queries: Tensor, key: nn.Linear, heads: int) -> Tensor:
    """Queries [U, W], H heads of W / H, moved through their key projection: [U, H, D], scaled as dot products are."""
    by_head = key.weight.unflatten(0, (heads, -1))
    queries = queries.unflatten(1, (heads, -1)) / math.sqrt(by_head.shape[1])
    return torch.einsum("uhe,hed->uhd", queries, by_head)


def bold(linear: nn.Linear, gain: float) -> nn.Linear:
    """`linear` with its first weights `gain` times as large as by default."""
    with torch.no_grad():
        linear.weight *= gain
    return linear


class QuestionReader(nn.Module):
    """Text states to one vector: attention pooling by a learned score a head, then a hidden layer and its norm.

    Args:
        text_width: D, channels of the states.
        width: W, of the result.
        heads: pooled vectors.
        dropout: on the result.
    """

    def __init__(self, text_width: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.whiten = Whiten(text_width, TEXT_SOFTNESS)
        self.score = nn.Linear(text_width, heads, bias=False)
        self.out = nn.Sequential(
            nn.LayerNorm(heads * text_width),
            nn.Linear(heads * text_width, width),
            nn.GELU(),
            nn.LayerNorm(width),
            Dropout(dropout, over="texts"),
        )

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """[U, L, D] and [U, L] bool, true on tokens, to [U, W]."""
        words = states.float()
        weights = words @ self.whiten.absorb(self.score.weight).T
        weights = weights.masked_fill(~mask[..., None], -torch.inf).softmax(dim=1)
        return self.out(self.whiten(weights.transpose(1, 2) @ words).flatten(1))


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


class Whiten(nn.Module):
    """An affine map, measured once on training features, that spreads them evenly over their directions.

    Frozen features share a few large directions, in which what tells them apart drowns. Directions are scaled by
    1 / sqrt(variance + `softness` * mean variance), so that the faintest ones are not blown up.
    Because the map is affine, attention over raw tokens can absorb it (`absorb`), and it can follow a weighted mean of
    raw tokens, whose weights sum to one.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int, softness: float) -> None:
        super().__init__()
        self.softness = softness
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))

    @torch.no_grad()
    def measure(self, rows: Tensor) -> None:
        """Take the map from [..., D] samples, evenly spread ones where there are many."""
        flat = rows.reshape(-1, rows.shape[-1])
        flat = flat[:: max(1, len(flat) // MEASURED_ROWS)].double()
        self.mean.copy_(flat.mean(0))
        values, directions = torch.linalg.eigh(torch.cov(flat.T))
        floor = self.softness * values.mean()
        scale = (values.clamp_min(0) + floor).clamp_min(1e-12).rsqrt()
        self.matrix.copy_((directions * scale) @ directions.T)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same, in float32."""
        return self.absorb(x.float() - self.mean)

    def absorb(self, query: Tensor) -> Tensor:
        """The query on raw tokens that scores them as `query` scores mapped ones, up to a constant."""
        # As one matrix: within a stack, the product with more dimensions would copy the map for each of them.
        return (query.reshape(-1, query.shape[-1]) @ self.matrix).view(query.shape)

    def then(self, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer that does to raw tokens what `linear` does to mapped ones."""
        weight = linear.weight @ self.matrix
        return weight, linear.bias - weight @ self.mean
