"""A plain baseline without selection: the question's words attend to every patch of every frame.

Shape legend: C clips, B questions, U unique texts, L text tokens, T frames, N patches a frame, D token channels,
W hidden width, A answers.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from egopatch.configs.schema import HeadConfig
from egopatch.features import PatchTokens
from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.noise import Dropout
from egopatch.train.heads.common.question import Classifier, Sizes, Whitening
from egopatch.train.heads.common.scale import scaled_patches

LAYERS = 2
SHRINKAGE = 0.1
POSITION_STD = 0.02


class Attention(nn.Module):
    """Projects the patches, adds learned positions and times, and lets the question's words attend to all of them in
    two layers. Keys and values are computed once per clip.
    """

    def __init__(self, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        width = config.width
        self.whiten = Whitening(sizes.width, SHRINKAGE)
        self.see = nn.Linear(sizes.width, width)
        self.place = nn.Parameter(torch.randn(sizes.grid[0] * sizes.grid[1], width) * POSITION_STD)
        self.time = nn.Parameter(torch.randn(sizes.frames, width) * POSITION_STD)
        self.read = nn.Sequential(nn.LayerNorm(sizes.text_width), nn.Linear(sizes.text_width, width))
        self.layers = nn.ModuleList(CrossLayer(width, config.heads, config.dropout) for _ in range(LAYERS))
        self.classify = Classifier(width, width, sizes.answers, config.dropout)

    def measure(self, tokens: PatchTokens) -> None:
        """Estimate the whitening from training clips."""
        self.whiten.measure(scaled_patches(tokens))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        weight, bias = self.whiten.then(self.see)
        place = self.place if (positions := batch.tokens.positions) is None else self.place[positions.long()]
        patches = functional.linear(scaled_patches(batch.tokens), weight, bias) + place + self.time[:, None]
        patches = rearrange(patches, "c t n w -> c (t n) w")
        words = self.read(batch.states.float())[batch.text_index]
        mask = batch.mask[batch.text_index]
        for layer in self.layers:
            words = layer(words, mask, patches, batch.clip_index)
        share = mask / mask.sum(dim=1, keepdim=True)
        return self.classify((words * share[..., None]).sum(dim=1))


class CrossLayer(nn.Module):
    """Words attend to the patches of their clip, then to each other, then pass a hidden layer; a norm precedes each."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_patches = nn.LayerNorm(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.words = nn.Linear(width, 3 * width)
        self.out_patches, self.out_words = nn.Linear(width, width), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drops = nn.ModuleList(Dropout(dropout) for _ in range(3))

    def forward(self, words: Tensor, mask: Tensor, patches: Tensor, clip_index: Tensor) -> Tensor:
        """words [B, L, W], mask [B, L] bool, patches [C, T * N, W], clip_index [B]; returns [B, L, W]."""
        key, value = self._split(self.key_value(self.norm_patches(patches)), 2)
        (query,) = self._split(self.query(self.norms[0](words)), 1)
        words = words + self.drops[0](self.out_patches(_attend(query, key[clip_index], value[clip_index])))
        query, key, value = self._split(self.words(self.norms[1](words)), 3)
        words = words + self.drops[1](self.out_words(_attend(query, key, value, mask[:, None, None])))
        return words + self.drops[2](self.hidden(self.norms[2](words)))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split `x` into `parts` tensors [B, heads, L, W / heads]."""
        return rearrange(x, "b l (p h e) -> p b h l e", p=parts, h=self.heads).unbind(0)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return rearrange(functional.scaled_dot_product_attention(query, key, value, mask), "b h l e -> b l (h e)")
