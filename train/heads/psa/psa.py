"""Our head: partition the frame, select patches by the question, aggregate patch -> frame -> video.

Shape legend: C clips, B questions, T frames, N patches a frame (rows x cols), M coarse patches, D token channels,
H attention heads, U unique texts, W hidden width, k patches kept a frame, A answers. A derived store has only n
patches of each frame, and their positions in the grid.

The tokens are frozen and shared by all questions of a clip, so the fine level never projects single tokens: queries
absorb the key projections, and value projections follow the pooling (`select_attend`). Tokens already contain the
encoder's space and time embeddings; positions enter again as a learned spatial bias on the selection, as channels of
the coarse patches, and as embeddings of the frames.
"""

import decimal
import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from egopatch.configs.schema import ConfigError, HeadConfig
from egopatch.features import PatchTokens
from egopatch.features.common.units import counted
from egopatch.features.values.spec import keep_count, middle_indices
from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.noise import Dropout, Noise
from egopatch.train.heads.common.question import (
    ATTENTION_GAIN,
    Classifier,
    QuestionReader,
    Sizes,
    Whitening,
    absorb_key,
    full_precision,
    read_together,
    with_gain,
    without_autocast,
)
from egopatch.train.heads.common.region import grow_region
from egopatch.train.heads.common.scale import scaled_patches
from egopatch.train.heads.psa.coarse import CoarseLevel
from egopatch.train.heads.psa.prior import spatial_prior
from egopatch.train.heads.psa.selection import Patches, PatchSelection
from egopatch.train.ops.rows import RowPicker

# Range of the random scores: small, because they enter the attention logits too and should only rank the patches.
RANDOM_SPAN = 1e-3
# Of 2, 0.3 and 0.1, 0.3 had the best mean on val of EgoSynth's hard set (docs/egosynth_training.md).
SHRINKAGE = 0.3
# Patches of a frame that may join the growing region, as in the paper of MFAS.
GROWTH = 3
# Several heads attend over the frames, so that the head can separate what precedes an event from what follows it.
FRAME_HEADS = 2
FRAME_TEMPERATURE = 4.0
# Standard deviations of the initial time embeddings: of those added to the frames, and of those added to their keys.
# They only have to be small: on val of the demo's EgoSynth (4 frames, seeds 0 and 1), these, (0, 0), (0.02, 0.02),
# (0.3, 0.02) and (0.3, 0.3) have means within 0.6 points, 86.0 to 86.6; (0.02, 1) has 53.1.
TIME_STD = 0.02
TIME_KEY_STD = 0.3
# Gain of the initial value weights: at first a frame is the mean of many patches, which hardly differs between clips.
VALUE_GAIN = 3.0


class PSA(nn.Module):
    """Partition, selection, aggregation under the guidance of the question.

    `HeadConfig` switches each part on or off; a part that is off has no parameters.

    Raises:
        ConfigError: The store has fewer patches or frames than the config needs.
    """

    read_frames: Tensor
    region: Tensor
    saliency_scale: Tensor

    def __init__(self, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.grid, self.heads = sizes.grid, heads
        self.scores, self.levels = frozenset(config.scores), frozenset(config.levels)
        self.frame_indices = _frames_to_read(sizes.frames, config.frames)
        # On the device with the head: a copy in every step would make the host wait for the GPU.
        self.register_buffer("read_frames", torch.tensor(self.frame_indices), persistent=False)
        self.select = PatchSelection(_patches_kept(config, sizes), config.implementation)
        self.whiten = Whitening(sizes.width, SHRINKAGE)
        # Three readings of the question: what it asks, where to look, and when.
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
        self.register_buffer("saliency_scale", torch.tensor([0.0, 1.0]))  # mean and standard deviation
        # Aggregation, patch -> frame
        if "patch" in self.levels:
            self.query = with_gain(nn.Linear(width, width), ATTENTION_GAIN)
            self.key = with_gain(nn.Linear(sizes.width, width, bias=False), ATTENTION_GAIN)
        self.value = with_gain(nn.Linear(sizes.width, width), VALUE_GAIN)
        self.to_frame = nn.Linear(width + heads, width)
        self.coarse = CoarseLevel(sizes, width, heads, config.merge, config.implementation) if config.coarse else None
        self.drop = Dropout(config.dropout)
        # frame -> video
        frames = len(self.frame_indices)
        keyed = config.time and "frame" in self.levels
        self.time = nn.Parameter(torch.randn(frames, width) * TIME_STD) if config.time else None
        self.time_key = nn.Parameter(torch.randn(frames, width) * TIME_KEY_STD) if keyed else None
        if "frame" in self.levels:
            self.frame_query = nn.Linear(width, FRAME_HEADS * width)
        video = FRAME_HEADS * width if "frame" in self.levels else width
        both = width if "video" in self.levels else 0
        self.classify = Classifier(video + width + both, width, sizes.answers, config.dropout)

    @property
    def measures_kept_patches(self) -> bool:
        """Whether `measure` reads only the kept patches: those are known in advance if saliency alone selects them."""
        return self.scores == {"saliency"}

    @torch.no_grad()
    def measure(self, tokens: PatchTokens) -> None:
        """Estimate the whitening and the scale of the saliency from training clips.

        If saliency alone selects, only the kept patches count, so that a derived store gives the same estimates.
        """
        tokens = self.select_frames(tokens)
        x, saliency = scaled_patches(tokens), tokens.saliency.float()
        if self.measures_kept_patches:
            # In falling order, as a derived store has them.
            best = saliency.sort(dim=-1, descending=True, stable=True).indices[..., : self.select.ks[0]]
            saliency = saliency.gather(2, best)
            x = x.gather(2, best[..., None].expand(*best.shape, x.shape[-1]))
        self.whiten.measure(x)
        deviation = saliency.std().clamp_min(1e-6) if saliency.numel() > 1 else saliency.new_ones(())
        self.saliency_scale.copy_(torch.stack([saliency.mean(), deviation]))

    def select_frames(self, tokens: PatchTokens) -> PatchTokens:
        """The tokens of the frames that this head reads."""
        if len(self.frame_indices) == tokens.patches.shape[1]:
            return tokens
        kept = {n: t if n == "cls" else t.index_select(1, self.read_frames) for n, t in tokens.tensors().items()}
        return PatchTokens(**kept)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        return self._logits_and_kept(self._with_read_frames(batch))[0]

    def answer(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, A] and the kept patches [B, T, rows * cols] bool."""
        batch = self._with_read_frames(batch)
        logits, kept = self._logits_and_kept(batch)
        positions = _grid_positions(batch)
        if positions is not None:
            whole = kept.new_zeros(*kept.shape[:2], self.grid[0] * self.grid[1])
            kept = whole.scatter(2, positions[batch.clip_index], kept)
        return logits, kept

    def _with_read_frames(self, batch: Batch) -> Batch:
        """The batch with the tokens of the frames that this head reads."""
        assert batch.stored is not None
        if len(self.frame_indices) == batch.stored.patches.shape[1]:
            return batch
        return batch.with_tokens(self.select_frames(batch.tokens))

    def _logits_and_kept(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, A] and the kept ones of the stored patches [B, T, n] bool."""
        readers = [self.read, *(reader for reader in self.readers.values() if isinstance(reader, QuestionReader))]
        # Under autocast only the products of all frames are in bfloat16: those of texts and questions are small, and
        # would take more launches for casts than for themselves.
        with without_autocast(batch.states):
            what, *others = read_together(readers, batch.states, batch.mask)
        read = dict(zip(self.readers, others, strict=True))
        rows = RowPicker(batch.text_index, len(what))
        frames, kept = self.attend_patches(batch, read.get("where", what), rows)
        with without_autocast(batch.states):
            video = self.attend_frames(full_precision(frames), rows.of(read.get("when", what)))
            question = rows.of(what)
            parts = [video, question]
            if "video" in self.levels:
                parts.append(video[:, : question.shape[1]] * question)
            return self.classify(torch.cat(parts, dim=-1)), kept

    def attend_patches(self, batch: Batch, question: Tensor, rows: RowPicker) -> tuple[Tensor, Tensor]:
        """Patch -> frame, for questions [U, W]: [B, T, W], and the kept patches [B, T, n] bool.

        The stored patches are read in place. `rows` picks the text of each question.
        """
        tokens = batch.stored
        assert tokens is not None
        width = tokens.patches.shape[-1]
        with without_autocast(question):
            selector_ud = self.selectors(question)
            if "patch" in self.levels:
                queries_uhd = self.whiten.absorb(absorb_key(self.query(question), self.key, self.heads))
            else:
                queries_uhd = question.new_zeros(len(question), self.heads, width)
            # lse says how well the best patches fit, which the softmax alone would hide; it is centred like the tokens.
            centre = (queries_uhd + selector_ud[:, None]) @ self.whiten.mean
        pooled, lse, kept = self.select(
            Patches(tokens.patches, batch.clip_index, tokens.scale, batch.clip_rows),
            rows.of(queries_uhd).float(),
            rows.of(selector_ud).float(),
            self.bias(batch.select_clips(tokens.saliency).float(), _grid_positions(batch)),
        )
        weight, bias = self.whiten.then(self.value)
        by_head = rearrange(weight, "(h e) d -> h e d", h=self.heads)
        values = rearrange(torch.einsum("bthd,hed->bthe", pooled, by_head), "b t h e -> b t (h e)") + bias
        fit = lse - rows.of(centre)[:, None]
        frames = self.to_frame(torch.cat([values, fit], dim=-1))
        if self.coarse is not None:
            frames = torch.addcmul(frames, *self.coarse(self.whiten, batch, question, rows))
        return self.drop(functional.gelu(frames)), kept

    def selectors(self, question: Tensor) -> Tensor:
        """Selection query of each question [U, W] for raw tokens: [U, D]."""
        if "question" not in self.scores:
            return question.new_zeros(len(question), self.whiten.mean.shape[0])
        return self.whiten.absorb(self.selector(question) / math.sqrt(self.whiten.mean.shape[0]))

    @torch.no_grad()
    def patch_scores(self, batch: Batch) -> dict[str, Tensor]:
        """Scores of the stored patches, [B, T, n] each: `selection`, whose k highest a frame keeps, and its parts.

        The parts are `saliency`, and `question` and `prior` if the head has them. Random scores have no `selection`.
        """
        tokens = self.select_frames(batch.tokens)
        reader = dict(self.readers).get("where", self.read)
        selector_bd = self.selectors(reader(batch.states, batch.mask))[batch.text_index].float()
        saliency = tokens.saliency.float()
        positions = None if tokens.positions is None else tokens.positions.long()
        patches = scaled_patches(tokens)
        clips = batch.clip_index.tolist()
        question_scores = torch.stack([patches[c] @ selector for c, selector in zip(clips, selector_bd, strict=True)])
        scores = {}
        if "random" not in self.scores:
            scores["selection"] = question_scores + self.bias(saliency, positions)[batch.clip_index]
        if "question" in self.scores:
            scores["question"] = question_scores
        scores["saliency"] = saliency[batch.clip_index]
        if "prior" in self.scores:
            prior = (self.prior if positions is None else self.prior[positions]).expand_as(saliency)
            scores["prior"] = prior[batch.clip_index]
        return scores

    def bias(self, saliency: Tensor, positions: Tensor | None) -> Tensor:
        """Score of each patch that is independent of the question, from saliency and grid positions: [C, T, n] each."""
        if "prior" in self.scores:
            bias = self.prior if positions is None else self.prior[positions]
        else:
            bias = saliency.new_zeros(())
        if "saliency" in self.scores:
            mean, deviation = self.saliency_scale
            bias = torch.addcmul(bias, self.saliency_weight, (saliency - mean) / deviation)
        if "random" in self.scores:
            bias = torch.add(bias, self.random(saliency), alpha=RANDOM_SPAN)
        bias = bias.expand_as(saliency)
        if self.grows:
            bias = bias.masked_fill(~self.grown_region(saliency, positions), -torch.inf)
        return bias

    def grown_region(self, saliency: Tensor, positions: Tensor | None) -> Tensor:
        """The patches that may be selected, [C, T, n] bool."""
        if positions is None:
            return grow_region(saliency, self.region, GROWTH)
        whole = saliency.new_full((*saliency.shape[:2], self.region.numel()), -torch.inf).scatter(
            2, positions, saliency
        )
        return grow_region(whole, self.region, GROWTH).gather(2, positions)

    def attend_frames(self, frames: Tensor, question: Tensor) -> Tensor:
        """Frame -> video: attention of the question over frames and their times, [B, heads * W], or their mean."""
        if "frame" not in self.levels:
            return (frames if self.time is None else frames + self.time).mean(dim=1)
        # <q, frame + time> and sum p (frame + time), without adding the times to the frames of every question.
        scale = math.sqrt(frames.shape[2])
        query = self.frame_query(question) / (FRAME_TEMPERATURE * scale)
        query = rearrange(query, "b (h w) -> b h w", h=FRAME_HEADS)
        if self.time is None or self.time_key is None:
            return ((query @ frames.transpose(1, 2)).softmax(dim=-1) @ frames).flatten(1)
        logits = torch.baddbmm(query @ (scale * self.time_key.T), query, frames.transpose(1, 2))
        weights = logits.softmax(dim=-1)
        return torch.baddbmm(weights @ self.time, weights, frames).flatten(1)


def _grid_positions(batch: Batch) -> Tensor | None:
    """Position of each stored patch in the whole grid, [C, T, n] long; None if all patches are stored, in order."""
    assert batch.stored is not None
    positions = batch.stored.positions
    return None if positions is None else batch.select_clips(positions).long()


def _patches_kept(config: HeadConfig, sizes: Sizes) -> int:
    whole = sizes.grid[0] * sizes.grid[1]
    k = whole if "all" in config.scores else keep_count(config.ratio, whole)
    if k > sizes.patches:
        # Rounded down: a ratio that is only a little above the store's share keeps one patch more.
        most = decimal.Context(prec=3, rounding=decimal.ROUND_DOWN).divide(sizes.patches, whole)
        raise ConfigError(
            f"head.ratio {config.ratio:g} with head.scores {', '.join(config.scores)} keeps {k} of {whole} patches a "
            f"frame, but the store has {sizes.patches}; use a ratio of at most {most}, or the "
            "store that this one was derived from"
        )
    if config.coarse and sizes.patches < whole:
        raise ConfigError(
            f"head.coarse is true but the store has {sizes.patches} of {whole} patches a frame, too few to merge; "
            "use --head.coarse false, or the store that this one was derived from"
        )
    return k


def _frames_to_read(stored: int, wanted: int | None) -> tuple[int, ...]:
    """Indices of the middle frames of `wanted` equal spans of the stored frames."""
    if wanted is None:
        return tuple(range(stored))
    if wanted > stored:
        raise ConfigError(
            f"head.frames is {wanted} but the store has {counted(stored, 'frame')} a clip; use at most {stored}"
        )
    return tuple(middle_indices(stored, wanted))
