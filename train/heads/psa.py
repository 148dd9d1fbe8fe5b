"""Ours: partition the frame, select patches by the question, aggregate patch -> frame -> video.

Shape legend: C clips, B questions, T frames, N patches a frame (rows x cols), M coarse patches, D token channels,
H attention heads, U unique texts, W hidden width, k patches kept a frame, A answers.

The tokens are frozen and shared by all questions of a clip, so no projection is ever applied to them one by one at the
fine level: key projections are absorbed into the queries and value projections follow the pooling (`select_attend`).
Tokens already carry the encoder's own space and time embeddings; positions enter once more as a learned spatial bias
on the selection, as embeddings of the coarse patches, and as embeddings of the frames.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.schema import HeadConfig
from features import PatchTokens
from train.batches import Batch
from train.heads.question import Classifier, QuestionReader, Sizes, Whiten
from train.ops.select_attend import select_attend

# Where hands and handled objects are: rows 4-13 and columns 2-11 of the published 14x14 grid (MFAS).
REGION = (4 / 14, 14 / 14, 2 / 14, 12 / 14)
# Random scores only rank: this small they leave the attention itself alone.
RANDOM_SPAN = 1e-3
MERGE = 2
SOFTNESS = 2.0
# Frames are attended to by several heads, so that what came before and after an event can be told apart.
FRAME_HEADS = 2
FRAME_TEMPERATURE = 4.0


class PSA(nn.Module):
    """Partition, selection, aggregation under the guidance of the question.

    Every part is a switch of `HeadConfig`: the ratio, what patches are scored by, the coarse level, its merge.
    """

    def __init__(self, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        rows, cols = sizes.grid
        width, heads = config.width, config.heads
        self.k = keep_count(config.ratio, rows * cols)
        self.scores = frozenset(config.scores)
        self.implementation = config.implementation
        self.whiten = Whiten(sizes.width, SOFTNESS)
        self.read = QuestionReader(sizes.text_width, width, heads, config.dropout)
        # Selection: s = <selector, x> + saliency weight * saliency + prior
        self.selector = nn.Linear(width, sizes.width)
        self.saliency_weight = nn.Parameter(torch.tensor(0.1))
        self.prior = nn.Parameter(region_prior(sizes.grid).flatten())
        # Aggregation, patch -> frame
        self.query = nn.Linear(width, heads * sizes.width)
        self.to_frame = nn.Linear(heads * sizes.width + heads, width)
        self.coarse = CoarseLevel(sizes, width, heads, config.merge) if config.coarse else None
        self.drop = nn.Dropout(config.dropout)
        # frame -> video
        self.time = nn.Parameter(torch.randn(sizes.frames, width) * 0.02)
        self.time_key = nn.Parameter(torch.randn(sizes.frames, width) * 0.3)
        self.frame_query = nn.Linear(width, FRAME_HEADS * width)
        self.classify = Classifier((FRAME_HEADS + 2) * width, width, sizes.answers, config.dropout)

    def measure(self, tokens: PatchTokens) -> None:
        """Take the whitening from training clips."""
        self.whiten.measure(_scaled(tokens))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        return self.answer(batch)[0]

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, A] and the kept patches [B, T, k]."""
        assert batch.tokens is not None
        question = self.read(batch.states, batch.mask)
        frames, kept = self.look(batch.tokens, batch.clip_index, question, batch.text_index)
        question = question[batch.text_index]
        video = self.watch(frames, question)
        both = video[:, : question.shape[1]] * question
        return self.classify(torch.cat([video, question, both], dim=-1)), kept

    def look(
        self, tokens: PatchTokens, clip_index: Tensor, question: Tensor, text_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Patch -> frame, for questions [U, W]: [B, T, W], and the kept patches [B, T, k]."""
        width = tokens.patches.shape[-1]
        queries = self.query(question).view(len(question), -1, width) / math.sqrt(width)
        selector = self.selector(question) / math.sqrt(width)
        if "question" not in self.scores:
            selector = torch.zeros_like(selector)
        queries_uhd, selector_ud = self.whiten.absorb(queries), self.whiten.absorb(selector)
        # How well the best patches fit, which the softmax alone would hide, is lse; centred like the tokens.
        centre = (queries_uhd + selector_ud[:, None]) @ self.whiten.mean
        out = select_attend(
            tokens.patches,
            clip_index,
            queries_uhd[text_index].float(),
            selector_ud[text_index].float(),
            self.bias(tokens),
            self.k,
            scale=tokens.scale,
            implementation=self.implementation,
        )
        fit = out.lse - centre[text_index][:, None]
        frames = self.to_frame(torch.cat([self.whiten(out.pooled).flatten(2), fit], dim=-1))
        if self.coarse is not None:
            frames = frames + self.coarse(_scaled(tokens), self.whiten, clip_index, question[text_index])
        return self.drop(functional.gelu(frames)), out.kept

    def bias(self, tokens: PatchTokens) -> Tensor:
        """What a patch is worth whatever the question: [C, T, N]."""
        saliency = tokens.saliency.float()
        bias = torch.zeros_like(saliency)
        if "saliency" in self.scores:
            spread = saliency.std(dim=-1, keepdim=True).clamp_min(1e-6)
            bias = bias + self.saliency_weight * (saliency - saliency.mean(dim=-1, keepdim=True)) / spread
        if "prior" in self.scores:
            bias = bias + self.prior
        if "random" in self.scores:
            bias = bias + RANDOM_SPAN * torch.rand_like(saliency)
        return bias

    def watch(self, frames: Tensor, question: Tensor) -> Tensor:
        """Frame -> video: attention of the question over frames and their times, [B, heads * W]."""
        b, _, width = frames.shape
        queries = self.frame_query(question).view(b, FRAME_HEADS, width)
        keys = frames / math.sqrt(width) + self.time_key
        weights = (torch.einsum("bhw,btw->bht", queries, keys) / FRAME_TEMPERATURE).softmax(dim=-1)
        return torch.einsum("bht,btw->bhw", weights, frames + self.time).flatten(1)


class CoarseLevel(nn.Module):
    """Attention over 2x2-merged patches, all of them kept: the surroundings of what the fine level selects.

    Coarse patches are a quarter as many and are projected once a clip, not once a question, so that here the merge can
    be learned and positions can be added.
    """

    def __init__(self, sizes: Sizes, width: int, heads: int, learned: bool) -> None:
        super().__init__()
        rows, cols = (math.ceil(side / MERGE) for side in sizes.grid)
        self.grid, self.heads = sizes.grid, heads
        self.corner = nn.Parameter(torch.zeros(MERGE * MERGE), requires_grad=learned)
        self.content = nn.Parameter(torch.zeros(sizes.width), requires_grad=learned)
        self.project = nn.Linear(sizes.width, width)
        self.norm = nn.LayerNorm(width)
        self.space = nn.Parameter(torch.randn(rows * cols, width) * 0.02)
        self.query = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, whiten: Whiten, clip_index: Tensor, question: Tensor) -> Tensor:
        """Raw tokens [C, T, N, D] and questions [B, W] to [B, T, W]."""
        b, width = question.shape
        coarse = self.norm(self.project(whiten(self.merge(x, whiten.absorb(self.content))))) + self.space
        c, t, m, _ = coarse.shape
        keys = coarse.view(c, t, m, self.heads, -1)
        queries = self.query(question).view(b, self.heads, -1) / math.sqrt(width // self.heads)
        picked = keys[clip_index]
        weights = torch.einsum("bhe,btmhe->bthm", queries, picked).softmax(dim=-1)
        return self.out(torch.einsum("bthm,btmhe->bthe", weights, picked).flatten(2))

    def merge(self, x: Tensor, content: Tensor) -> Tensor:
        """[C, T, N, D] to [C, T, M, D]: a weighted mean of each 2x2 block, of what there is of it at odd edges."""
        c, t, _, d = x.shape
        rows, cols = self.grid
        bottom, right = rows % MERGE, cols % MERGE
        scores = (x @ content).view(c, t, rows, cols)
        scores = functional.pad(scores, (0, right, 0, bottom), value=-torch.inf)
        x = functional.pad(x.view(c, t, rows, cols, d), (0, 0, 0, right, 0, bottom))
        blocks = (c, t, x.shape[2] // MERGE, MERGE, x.shape[3] // MERGE, MERGE)
        scores = scores.view(blocks).transpose(3, 4).flatten(4) + self.corner
        x = x.view(*blocks, d).transpose(3, 4).flatten(4, 5)
        return torch.einsum("ctrqi,ctrqid->ctrqd", scores.softmax(dim=-1), x).flatten(2, 3)


def keep_count(ratio: float, patches: int) -> int:
    """k = ceil(ratio * N), without the rounding noise of a ratio such as 0.07."""
    return max(1, min(patches, math.ceil(round(ratio * patches, 6))))


def region_prior(grid: tuple[int, int]) -> Tensor:
    """[rows, cols]: the share of each patch that lies in the published region, scaled to this grid."""
    rows, cols = grid
    top, bottom, left, right = REGION
    return torch.outer(_overlap(rows, top, bottom), _overlap(cols, left, right))


def _overlap(cells: int, first: float, last: float) -> Tensor:
    edges = torch.arange(cells + 1, dtype=torch.float32) / cells
    return (edges[1:].clamp(max=last) - edges[:-1].clamp(min=first)).clamp(min=0) * cells


def _scaled(tokens: PatchTokens) -> Tensor:
    patches = tokens.patches.float()
    return patches if tokens.scale is None else patches * tokens.scale[..., None]
