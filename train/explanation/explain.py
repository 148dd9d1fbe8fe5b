"""Explains a trained run: which patches matter to its answers, by every score that ranks them.

Shape legend: C clips of a batch, B questions, T frames that the head reads, N stored patches a frame, D channels,
S shares of the curves, P sets of present patches.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import Question
from egopatch.extract.datasets.egosynth.places import Places
from egopatch.features import PatchTokens
from egopatch.features.values.spec import keep_count
from egopatch.train.data.batch import Batch
from egopatch.train.data.question_table import QuestionTable, plan_batches
from egopatch.train.explanation.agreement import agreement_of, known_places, pointing
from egopatch.train.explanation.curves import SHARES, area, curves
from egopatch.train.explanation.record import Explanation, Ranking
from egopatch.train.fitting.experiment import Experiment, caller_state_kept, open_experiment
from egopatch.train.fitting.shortage import shortage_explained
from egopatch.train.fitting.trained import open_head, require_video, trained_config
from egopatch.train.heads import PSA, unwrapped
from egopatch.train.heads.common.scale import scaled_patches
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.scores.statistics import Interval, compare
from egopatch.train.steps.stacked_heads import StackedHeads

# Questions of a batch: here each question has its own copy of its clip's tokens.
BATCH = 32
# Approximate bytes of tokens that one forward pass of the head reads.
PASS_BYTES = 1 << 27
RANDOM, KNOWN = "random", "known places"


@dataclass(frozen=True)
class _Measured:
    """One ranking on the questions of one batch.

    Attributes:
        deletion, insertion: [S, B].
        kept: [B, T, k] the patches with the highest scores, the highest first, as positions in the grid.
    """

    deletion: Tensor
    insertion: Tensor
    kept: NDArray[np.int64]


def explain(config: Config, questions: int = 200) -> Explanation:
    """Measure the head in `config.run.dir` on questions of *test*.

    Args:
        config: The experiment that the head was trained with.
        questions: Minimum number of questions, drawn clip by clip with a fixed seed; all if there are fewer.

    Raises:
        RunError: There is no trained head in `run.dir`, its files are damaged or from different trainings, or the GPU's
            memory is too small.
        ConfigError: The head reads no video, or `questions` is less than 1.
        StoreError, DatasetError, FingerprintMismatch: As `open_experiment`.
    """
    if questions < 1:
        raise ConfigError(f"--questions is {questions}; expected at least 1")
    folder = config.run.dir
    card = Card.read(folder)
    require_video(folder, card)
    config = trained_config(config, card)
    with shortage_explained(config.train, folder), caller_state_kept(config.train.device):
        experiment = open_experiment(config, card)
        experiment.require_trained_on(folder)
        head, heads = open_head(config, folder, card, experiment.sizes, experiment.device)
        psa = unwrapped(head)
        return _Explainer(experiment, heads, psa if isinstance(psa, PSA) else None, config.head.ratio).run(questions)


class _Explainer:
    """Measures every ranking on a sample of questions."""

    def __init__(self, experiment: Experiment, heads: StackedHeads, psa: PSA | None, ratio: float) -> None:
        self.experiment, self.heads, self.psa = experiment, heads, psa
        sizes = experiment.sizes
        self.grid, self.k = sizes.grid, min(keep_count(ratio, sizes.grid[0] * sizes.grid[1]), sizes.patches)

    @torch.no_grad()
    def run(self, questions: int) -> Explanation:
        table = _sample(self.experiment.encoded["test"], questions)
        if not len(table):
            raise RunError("no test question is about an encoded clip, so there is nothing to explain")
        average = self._average(table)
        found: dict[str, list[_Measured]] = {}
        clips: list[str] = []
        places: list[Places | None] = []
        for number, batch in enumerate(self._batches(table)):
            asked = [table.questions[row] for row in batch.rows.tolist()]
            clips += [question.clip_id for question in asked]
            places += [self._places(question) for question in asked]
            for name, scores in self._scores(batch, places[-len(asked) :], number).items():
                found.setdefault(name, []).append(self._measure(batch, number, scores, average))
        rankings = tuple(
            self._ranking(name, measured, found[RANDOM], clips, places) for name, measured in found.items()
        )
        return Explanation(len(clips), self.k, self.grid[0] * self.grid[1], SHARES, rankings)

    def _ranking(
        self,
        name: str,
        measured: list[_Measured],
        chance: list[_Measured],
        clips: list[str],
        places: list[Places | None],
    ) -> Ranking:
        """A ranking over all batches, compared with `chance`, the measurements of the random one."""
        kept = [row for batch in measured for row in batch.kept]
        known = [(row, place) for row, place in zip(kept, places, strict=True) if place is not None]
        deletion, insertion = [batch.deletion for batch in measured], [batch.insertion for batch in measured]
        return Ranking(
            name=name,
            deletion=_percents(deletion),
            insertion=_percents(insertion),
            deletion_gap=None if name == RANDOM else _gap(deletion, [batch.deletion for batch in chance], clips),
            insertion_gap=None if name == RANDOM else _gap(insertion, [batch.insertion for batch in chance], clips),
            agreement=agreement_of(known, self.grid[0] * self.grid[1]),
            pointing=pointing((row[:, 0], place) for row, place in known),
        )

    def _batches(self, table: QuestionTable) -> Iterator[Batch]:
        """Small batches with the tokens of the frames that the head reads; any scale is already applied."""
        for batch in self.experiment.features.stream(table, plan_batches(table, BATCH, seed=None)):
            tokens = batch.tokens if self.psa is None else self.psa.select_frames(batch.tokens)
            plain = {name: tensor for name, tensor in tokens.tensors().items() if name != "scale"}
            if tokens.scale is not None:
                plain["patches"] = scaled_patches(tokens)
            yield batch.with_tokens(PatchTokens(**plain))

    def _average(self, table: QuestionTable) -> tuple[Tensor, Tensor]:
        """The average patch [D] and its saliency, over the clips of these questions."""
        patches, saliency = [], []
        for batch in self._batches(table):
            tokens = batch.tokens
            patches.append(tokens.patches.float().mean(dim=(1, 2)))
            saliency.append(tokens.saliency.float().mean(dim=(1, 2)))
        return torch.cat(patches).mean(dim=0), torch.cat(saliency).mean()

    def _scores(self, batch: Batch, places: list[Places | None], number: int) -> Mapping[str, Tensor]:
        """Every score that ranks the patches, by name: [B, T, N] each."""
        tokens = batch.tokens
        saliency = tokens.saliency.float()[batch.clip_index]
        scores = {"saliency": saliency} if self.psa is None else self.psa.patch_scores(batch)
        draw = torch.from_numpy(np.random.default_rng((0, number)).random(saliency.shape, dtype=np.float32))
        scores[RANDOM] = draw.to(saliency.device)
        if any(places):
            # Only the order of scores counts; the random scores order patches that tie.
            scores[KNOWN] = scores[RANDOM] + self._known(batch, places)
        return scores

    def _known(self, batch: Batch, places: list[Places | None]) -> Tensor:
        """[B, T, N]: 1 where there is an object that the question asks about, else 0."""
        tokens = batch.tokens
        whole = torch.zeros(len(batch), tokens.patches.shape[1], self.grid[0] * self.grid[1])
        for row, place in enumerate(places):
            for frame, patches in enumerate(() if place is None else place.asked):
                whole[row, frame, list(patches)] = 1
        whole = whole.to(tokens.patches.device)
        return whole if tokens.positions is None else whole.gather(2, tokens.positions.long()[batch.clip_index])

    def _measure(self, batch: Batch, number: int, scores: Tensor, average: tuple[Tensor, Tensor]) -> _Measured:
        tokens = batch.tokens
        shown = {name: tensor[batch.clip_index] for name, tensor in tokens.tensors().items()}
        mean_patch = average[0].to(tokens.patches)
        mean_saliency = average[1].to(tokens.saliency)

        def logits(present_pbtn: Tensor) -> Tensor:
            present = present_pbtn.flatten(0, 1)
            repeated = {
                name: tensor.repeat(len(present_pbtn), *[1] * (tensor.ndim - 1)) for name, tensor in shown.items()
            }
            repeated["patches"] = torch.where(present[..., None], repeated["patches"], mean_patch)
            repeated["saliency"] = torch.where(present, repeated["saliency"], mean_saliency)
            asked = _repeat(batch, len(present_pbtn)).with_tokens(PatchTokens(**repeated))
            return self.heads.logits(asked, number)[0][0].float().unflatten(0, present_pbtn.shape[:2])

        answer = logits(torch.ones_like(scores, dtype=torch.bool)[None]).argmax(dim=-1, keepdim=True)

        def probability(present_pbtn: Tensor) -> Tensor:
            sets = max(1, PASS_BYTES // (4 * shown["patches"].numel()))
            parts = [logits(part).softmax(dim=-1) for part in present_pbtn.split(sets)]
            return torch.cat(parts).gather(2, answer.expand(len(present_pbtn), -1, -1))[..., 0]

        deletion, insertion = curves(probability, scores)
        kept = scores.argsort(dim=-1, descending=True, stable=True)[..., : self.k]
        if tokens.positions is not None:
            kept = tokens.positions.long()[batch.clip_index].gather(2, kept)
        return _Measured(deletion.cpu(), insertion.cpu(), kept.cpu().numpy())

    def _places(self, question: Question) -> Places | None:
        """Places of the objects that an EgoSynth question asks about; None for other data sets."""
        frames = self.experiment.sizes.frames
        return known_places(question, frames, range(frames) if self.psa is None else self.psa.frame_indices, self.grid)


def _sample(table: QuestionTable, questions: int) -> QuestionTable:
    """Draw clips until they have at least `questions` questions; returns all questions about them."""
    if len(table) <= questions:
        return table
    counts, drawn, count = np.bincount(table.clip.numpy(), minlength=len(table.clips)), set[str](), 0
    order = list(range(len(table.clips)))
    random.Random(0).shuffle(order)
    for clip in order:
        if count >= questions:
            break
        drawn.add(table.clips[clip])
        count += int(counts[clip])
    return table.without_clips([clip for clip in table.clips if clip not in drawn])


def _repeat(batch: Batch, times: int) -> Batch:
    """Repeat the questions of a batch, each about a clip of its own; their texts are not repeated."""
    repeated = {name: getattr(batch, name).repeat(times) for name in ("text_index", "forms", "answers", "rows")}
    options = batch.options
    if options is not None:
        options = replace(options, index=options.index.repeat(times, 1), lengths=options.lengths.repeat(times, 1))
    each = torch.arange(times * len(batch), device=batch.clip_index.device)
    return replace(batch, clip_index=each, options=options, **repeated)


def _gap(ours: list[Tensor], chance: list[Tensor], clips: list[str]) -> Interval:
    """Mean area below our curves minus that below the random ones, with its interval. Curves are [S, B] a batch."""
    our_areas, chance_areas = (torch.cat([area(curve) for curve in batches]) for batches in (ours, chance))
    return compare(our_areas[None].numpy(), chance_areas[None].numpy(), clips).difference


def _percents(curves: list[Tensor]) -> tuple[float, ...]:
    """The mean of the curves, [S, B] for each batch, in percent."""
    return tuple(round(100 * value, 3) for value in torch.cat(curves, dim=1).double().mean(dim=1).tolist())
