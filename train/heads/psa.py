"""Ours: partition the frame, select patches by the question, aggregate patch -> frame -> video.

Shape legend: C clips, B questions, T frames, N patches a frame (rows x cols), M coarse patches, D token channels,
H attention heads, W hidden width, k patches kept a frame, A answers.

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
from train.heads.question import Block, Classifier, QuestionReader, Sizes, Standardise
from train.ops.select_attend import select_attend

# Where hands and handled objects are: rows 4-13 and columns 2-11 of the published 14x14 grid (MFAS).
REGION = (4 / 14, 14 / 14, 2 / 14, 12 / 14)
# Random scores only rank: this small they leave the attention itself alone.
RANDOM_SPAN = 1e-3
MERGE = 2


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
        self.standard = Standardise(sizes.width)
        self.read = QuestionReader(sizes.text_width, width, heads, config.dropout)
        # Selection: s = <selector, x> + saliency weight * saliency + prior
        self.key_width = max(16, width // heads)
        self.selector = nn.Linear(width, self.key_width)
        self.selector_key = _key(1, self.key_width, sizes.width)
        self.saliency_weight = nn.Parameter(torch.tensor(0.1))
        self.prior = nn.Parameter(region_prior(sizes.grid).flatten())
        # Aggregation, patch -> frame
        self.query = nn.Linear(width, heads * self.key_width)
        self.query_key = _key(heads, self.key_width, sizes.width)
        self.value = nn.Parameter(torch.randn(heads, sizes.width, width // heads) / math.sqrt(sizes.width))
        self.to_frame = nn.Linear(heads * (width // heads) + heads, width)
        self.coarse = CoarseLevel(sizes, width, heads, config.merge) if config.coarse else None
        # frame -> video
        self.time = nn.Parameter(torch.randn(sizes.frames, width) * 0.02)
        self.ask = nn.Linear(width, 2 * width)
        self.frames = Block(width, heads, config.dropout)
        self.frame_pool = nn.Linear(width, heads)
        self.pooled = nn.Linear(heads * width, width)
        self.classify = Classifier(4 * width, width, sizes.answers, config.dropout)
        self.blind = Classifier(width, width, sizes.answers, config.dropout)

    def measure(self, tokens: PatchTokens) -> None:
        """Take the standardisation from training clips."""
        self.standard.measure(_scaled(tokens))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        return self.answer(batch)[0]

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, A] and the kept patches [B, T, k]."""
        assert batch.tokens is not None
        question = self.read(batch.states, batch.mask)[batch.text_index]
        frames, kept = self.look(batch.tokens, batch.clip_index, question)
        video, asked = self.watch(frames, question)
        logits = self.classify(torch.cat([video, asked, question, video * question], dim=-1))
        return logits + self.blind(question), kept

    def look(self, tokens: PatchTokens, clip_index: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Patch -> frame: [B, T, W], and the kept patches [B, T, k]."""
        b, heads = len(question), self.query_key.shape[0]
        asked = self.query(question).view(b, heads, self.key_width)
        queries_bhd = torch.einsum("bhe,hed->bhd", asked, self.query_key) / math.sqrt(self.key_width)
        selector_bd = self.selector(question) @ self.selector_key[0] / math.sqrt(self.key_width)
        if "question" not in self.scores:
            selector_bd = torch.zeros_like(selector_bd)
        queries_bhd, selector_bd = self.standard.absorb(queries_bhd), self.standard.absorb(selector_bd)
        out = select_attend(
            tokens.patches,
            clip_index,
            queries_bhd.float().contiguous(),
            selector_bd.float().contiguous(),
            self.bias(tokens),
            self.k,
            scale=tokens.scale,
            implementation=self.implementation,
        )
        seen = torch.einsum("bthd,hdv->bthv", self.standard(out.pooled), self.value).flatten(2)
        # How well the best patches fit the question, which the softmax alone would hide; centred like the tokens.
        centre = (queries_bhd + selector_bd[:, None]) @ self.standard.mean
        frames = self.to_frame(torch.cat([seen, out.lse - centre[:, None]], dim=-1))
        if self.coarse is not None:
            frames = frames + self.coarse(self.standard(_scaled(tokens)), clip_index, question)
        return frames, out.kept

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

    def watch(self, frames: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Frame -> video: [B, W] pooled over frames, and [B, W] the question after it has seen them."""
        gain, shift = self.ask(question)[:, None].chunk(2, dim=-1)
        frames = functional.gelu(frames * (1 + gain) + shift) + self.time
        mixed = self.frames(torch.cat([question[:, None], frames], dim=1))
        asked, frames = mixed[:, 0], mixed[:, 1:]
        weights = self.frame_pool(frames + asked[:, None]).softmax(dim=1)
        return self.pooled(torch.einsum("bth,btw->bhw", weights, frames).flatten(1)), asked


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

    def forward(self, x: Tensor, clip_index: Tensor, question: Tensor) -> Tensor:
        """Standardised tokens [C, T, N, D] and questions [B, W] to [B, T, W]."""
        b, width = question.shape
        coarse = self.norm(self.project(self.merge(x))) + self.space
        c, t, m, _ = coarse.shape
        keys = coarse.view(c, t, m, self.heads, -1)
        queries = self.query(question).view(b, self.heads, -1) / math.sqrt(width // self.heads)
        picked = keys[clip_index]
        weights = torch.einsum("bhe,btmhe->bthm", queries, picked).softmax(dim=-1)
        return self.out(torch.einsum("bthm,btmhe->bthe", weights, picked).flatten(2))

    def merge(self, x: Tensor) -> Tensor:
        """[C, T, N, D] to [C, T, M, D]: a weighted mean of each 2x2 block, of what there is of it at odd edges."""
        c, t, _, d = x.shape
        rows, cols = self.grid
        bottom, right = rows % MERGE, cols % MERGE
        scores = (x @ self.content).view(c, t, rows, cols)
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


def _key(heads: int, key_width: int, width: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(heads, key_width, width) / math.sqrt(width))


def _scaled(tokens: PatchTokens) -> Tensor:
    patches = tokens.patches.float()
    return patches if tokens.scale is None else patches * tokens.scale[..., None]
