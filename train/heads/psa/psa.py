"""Ours: partition the frame, select patches by the question, aggregate patch -> frame -> video.

Shape legend: C clips, B questions, T frames, N patches a frame (rows x cols), M coarse patches, D token channels,
H attention heads, U unique texts, W hidden width, k patches kept a frame, A answers. A derived store holds only some
patches n of each frame, and their places in the grid.

The tokens are frozen and shared by all questions of a clip, so no projection is ever applied to them one by one at the
fine level: key projections are absorbed into the queries and value projections follow the pooling (`select_attend`).
Tokens already carry the encoder's own space and time embeddings; positions enter once more as a learned spatial bias
on the selection, as channels of the coarse patches, and as embeddings of the frames.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from egopatch.configs.schema import ConfigError, HeadConfig
from egopatch.features import PatchTokens
from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.noise import Dropout, Noise
from egopatch.train.heads.common.question import (
    ATTENTION_GAIN,
    Classifier,
    QuestionReader,
    Sizes,
    Whiten,
    absorb_key,
    bold,
)
from egopatch.train.heads.fused.fused import grow_region
from egopatch.train.heads.psa.coarse import MERGE, CoarseLevel, scaled
from egopatch.train.heads.psa.prior import spatial_prior
from egopatch.train.heads.psa.selection import Selection

# Random scores only rank: this small they leave the attention itself alone.
RANDOM_SPAN = 1e-3
SOFTNESS = 2.0
# Patches of a frame that may join the growing region, as in the paper of MFAS.
GROWTH = 3
# Frames are attended to by several heads, so that what came before and after an event can be told apart.
FRAME_HEADS = 2
FRAME_TEMPERATURE = 4.0
# A frame is at first the mean of many patches, in which one clip hardly differs from another.
VALUE_GAIN = 3.0


class PSA(nn.Module):
    """Partition, selection, aggregation under the guidance of the question.

    Every part is a switch of `HeadConfig`; what is switched off has no parameters.

    Raises:
        ConfigError: the store holds fewer patches or frames than the config needs.
    """

    region: Tensor
    saliency_scale: Tensor

    def __init__(self, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.grid, self.heads = sizes.grid, heads
        self.scores, self.levels = frozenset(config.scores), frozenset(config.levels)
        self.taken = _spread(sizes.frames, config.frames)
        self.select = Selection(_patches_kept(config, sizes), config.implementation)
        self.whiten = Whiten(sizes.width, SOFTNESS)
        # What is asked, where to look for it, and when: three readings of the question, each of the words it needs.
        self.read = QuestionReader(sizes.text_width, width, heads, config.dropout)
        where = "patch" in self.levels or "question" in self.scores or config.coarse
        used = {"where": where, "when": "frame" in self.levels} if config.readers == 3 else {}
        self.readers = nn.ModuleDict(
            {name: QuestionReader(sizes.text_width, width, heads, config.dropout) for name, use in used.items() if use}
        )
        # Selection: s = <selector, x> + saliency weight * saliency + prior, within the region
        if "question" in self.scores:
            self.selector = nn.Linear(width, sizes.width)
        if "saliency" in self.scores:
            self.saliency_weight = nn.Parameter(torch.tensor(config.saliency_weight))
        if "prior" in self.scores:
            self.prior = nn.Parameter(spatial_prior(sizes.grid, config.prior).flatten(), config.prior_learned)
        if "random" in self.scores:
            self.random = Noise(over="clips")
        self.grows = config.growth
        self.register_buffer("region", spatial_prior(sizes.grid, "region") > 0.5, persistent=False)
        self.register_buffer("saliency_scale", torch.tensor([0.0, 1.0]))  # mean and spread
        # Aggregation, patch -> frame
        if "patch" in self.levels:
            self.query = bold(nn.Linear(width, width), ATTENTION_GAIN)
            self.key = bold(nn.Linear(sizes.width, width, bias=False), ATTENTION_GAIN)
        self.value = bold(nn.Linear(sizes.width, width), VALUE_GAIN)
        self.to_frame = nn.Linear(width + heads, width)
        self.coarse = None
        if config.coarse:
            merged = math.ceil(self.grid[0] / MERGE) * math.ceil(self.grid[1] / MERGE)
            self.coarse = CoarseLevel(sizes, width, heads, config.merge, Selection(merged, config.implementation))
        self.drop = Dropout(config.dropout)
        # frame -> video
        frames = len(self.taken)
        keyed = config.time and "frame" in self.levels
        self.time = nn.Parameter(torch.randn(frames, width) * 0.02) if config.time else None
        self.time_key = nn.Parameter(torch.randn(frames, width) * 0.3) if keyed else None
        if "frame" in self.levels:
            self.frame_query = nn.Linear(width, FRAME_HEADS * width)
        video = FRAME_HEADS * width if "frame" in self.levels else width
        both = width if "video" in self.levels else 0
        self.classify = Classifier(video + width + both, width, sizes.answers, config.dropout)

    @property
    def measures_what_it_keeps(self) -> bool:
        """Whether saliency alone selects, so that what is kept is known before the first step."""
        return self.scores == {"saliency"}

    @torch.no_grad()
    def measure(self, tokens: PatchTokens) -> None:
        """Take the whitening and the scale of the saliency from training clips.

        Where saliency alone selects, from the patches that it keeps: these are the same in a derived store.
        """
        tokens = self.take(tokens)
        x, saliency = scaled(tokens), tokens.saliency.float()
        if self.measures_what_it_keeps:
            best = saliency.sort(dim=-1, descending=True, stable=True).indices[..., : self.select.ks[0]]
            saliency = saliency.gather(2, best)
            x = x.gather(2, best[..., None].expand(*best.shape, x.shape[-1]))
        self.whiten.measure(x)
        self.saliency_scale.copy_(torch.stack([saliency.mean(), saliency.std().clamp_min(1e-6)]))

    def take(self, tokens: PatchTokens) -> PatchTokens:
        """The frames that this head reads."""
        if len(self.taken) == tokens.patches.shape[1]:
            return tokens
        frames = torch.tensor(self.taken, device=tokens.patches.device)
        kept = {name: t if name == "cls" else t.index_select(1, frames) for name, t in tokens.tensors().items()}
        return PatchTokens(**kept)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        return self.answer(batch)[0]

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, A] and the kept patches [B, T, rows * cols] bool."""
        assert batch.stored is not None
        if len(self.taken) < batch.stored.patches.shape[1]:
            batch = batch.with_tokens(self.take(batch.tokens))
        what = self.read(batch.states, batch.mask)
        read = {name: reader(batch.states, batch.mask) for name, reader in self.readers.items()}
        frames, kept = self.look(batch, read.get("where", what))
        video = self.watch(frames, read.get("when", what)[batch.text_index])
        question = what[batch.text_index]
        parts = [video, question]
        if "video" in self.levels:
            parts.append(video[:, : question.shape[1]] * question)
        places = _places(batch)
        if places is not None:
            places = places[batch.clip_index]
            whole = kept.new_zeros(*kept.shape[:2], self.grid[0] * self.grid[1])
            kept = whole.scatter(2, places, kept)
        return self.classify(torch.cat(parts, dim=-1)), kept

    def look(self, batch: Batch, question: Tensor) -> tuple[Tensor, Tensor]:
        """Patch -> frame, for questions [U, W]: [B, T, W], and the kept patches [B, T, n] bool.

        The patches of the stored clips are read in place.
        """
        tokens = batch.stored
        assert tokens is not None
        width = tokens.patches.shape[-1]
        queries_uhd = question.new_zeros(len(question), self.heads, width)
        selector_ud = question.new_zeros(len(question), width)
        if "patch" in self.levels:
            queries_uhd = self.whiten.absorb(absorb_key(self.query(question), self.key, self.heads))
        if "question" in self.scores:
            selector_ud = self.whiten.absorb(self.selector(question) / math.sqrt(width))
        # How well the best patches fit, which the softmax alone would hide, is lse; centred like the tokens.
        centre = (queries_uhd + selector_ud[:, None]) @ self.whiten.mean
        pooled, lse, kept = self.select(
            tokens.patches,
            batch.clip_index,
            queries_uhd[batch.text_index].float(),
            selector_ud[batch.text_index].float(),
            self.bias(batch.select_clips(tokens.saliency).float(), _places(batch)),
            tokens.scale,
            batch.clip_rows,
        )
        weight, bias = self.whiten.then(self.value)
        by_head = weight.view(self.heads, -1, width)
        values = torch.einsum("bthd,hed->bthe", pooled, by_head).flatten(2) + bias
        fit = lse - centre[batch.text_index][:, None]
        frames = self.to_frame(torch.cat([values, fit], dim=-1))
        if self.coarse is not None:
            frames = frames + self.coarse(self.whiten, batch, question)
        return self.drop(functional.gelu(frames)), kept

    def bias(self, saliency: Tensor, places: Tensor | None) -> Tensor:
        """What a patch is worth whatever the question, from saliency and places in the grid: [C, T, n] each."""
        bias = torch.zeros_like(saliency)
        if "saliency" in self.scores:
            mean, spread = self.saliency_scale
            bias = bias + self.saliency_weight * (saliency - mean) / spread
        if "prior" in self.scores:
            bias = bias + (self.prior if places is None else self.prior[places])
        if "random" in self.scores:
            bias = bias + RANDOM_SPAN * self.random(saliency)
        if self.grows:
            bias = bias.masked_fill(~self.grown(saliency, places), -torch.inf)
        return bias

    def grown(self, saliency: Tensor, places: Tensor | None) -> Tensor:
        """The region that may be selected from, [C, T, n] bool."""
        if places is None:
            return grow_region(saliency, self.region, GROWTH)
        whole = saliency.new_full((*saliency.shape[:2], self.region.numel()), -torch.inf).scatter(2, places, saliency)
        return grow_region(whole, self.region, GROWTH).gather(2, places)

    def watch(self, frames: Tensor, question: Tensor) -> Tensor:
        """Frame -> video: attention of the question over frames and their times, [B, heads * W], or their mean."""
        if "frame" not in self.levels:
            return (frames if self.time is None else frames + self.time).mean(dim=1)
        # <q, frame + time> and sum p (frame + time), without adding the times to the frames of every question.
        query = self.frame_query(question).unflatten(1, (FRAME_HEADS, -1))
        logits = query @ frames.transpose(1, 2) / math.sqrt(frames.shape[2])
        if self.time_key is not None:
            logits = logits + query @ self.time_key.T
        weights = (logits / FRAME_TEMPERATURE).softmax(dim=-1)
        video = weights @ frames
        return (video if self.time is None else video + weights @ self.time).flatten(1)


def keep_count(ratio: float, patches: int) -> int:
    """k = ceil(ratio * N), without the rounding noise of a ratio such as 0.07."""
    return max(1, min(patches, math.ceil(round(ratio * patches, 6))))


def _places(batch: Batch) -> Tensor | None:
    """Place of each patch in the whole grid, [C, T, n] long; None where all of them are stored, in order."""
    assert batch.stored is not None
    positions = batch.stored.positions
    return None if positions is None else batch.select_clips(positions).long()


def _patches_kept(config: HeadConfig, sizes: Sizes) -> int:
    whole = sizes.grid[0] * sizes.grid[1]
    k = whole if "all" in config.scores else keep_count(config.ratio, whole)
    if k > sizes.patches:
        raise ConfigError(
            f"head.ratio {config.ratio:g} with head.scores {', '.join(config.scores)} keeps {k} of {whole} patches a "
            f"frame, but the store holds {sizes.patches}; expected a ratio of at most {sizes.patches / whole:.2g}, or "
            "the store that it was derived from"
        )
    if config.coarse and sizes.patches < whole:
        raise ConfigError(
            f"head.coarse is true but the store holds {sizes.patches} of {whole} patches a frame, of which no coarse "
            "ones can be merged; expected --head.coarse false, or the store that it was derived from"
        )
    return k


def _spread(stored: int, wanted: int | None) -> tuple[int, ...]:
    """The middle ones of `wanted` equal spans of the stored frames."""
    if wanted is None:
        return tuple(range(stored))
    if wanted > stored:
        raise ConfigError(f"head.frames is {wanted} but the store holds {stored} frames a clip; expected at most that")
    return tuple((2 * span + 1) * stored // (2 * wanted) for span in range(wanted))
