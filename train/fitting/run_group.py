"""Runs that train in lockstep: their stack of heads, their place in the batches, and the file they go on from.

`fit` trains a crew of one run. A sweep trains crews of many.
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from egopatch.configs.schema import Config
from egopatch.train.data.batch import Batch
from egopatch.train.data.features import Features
from egopatch.train.data.question_table import QuestionTable, plan_batches
from egopatch.train.fitting.answers import Answers, Marks
from egopatch.train.fitting.experiment import Experiment
from egopatch.train.fitting.run import Member
from egopatch.train.fitting.stacked_heads import Stack
from egopatch.train.heads import PSA, Majority, Pooled, build_head
from egopatch.train.heads.common.question import QuestionReader
from egopatch.train.heads.psa.selection import choose
from egopatch.train.rundir import card as folder
from egopatch.train.rundir.card import RunError
from egopatch.train.scores.metrics import Metrics

# Clips that the input whitening is measured on.
MEASURED_CLIPS = 64
# Saving the place at the end of an epoch may take this share of the time.
SAVING_SHARE = 0.05


class Crew:
    """Members of one shape on one reading of the features.

    Args:
        configs: of the members; they differ in `head.ratio`, `train.seed` and `run.dir` alone.
        experiment: their data.
        order: seed of the order of the batches.
        path: file that holds the crew's place.

    Attributes:
        place: (epoch, batch) that it learns next.
        selection: what runs `select_attend`, and why; None for heads that do not select.

    Raises:
        ConfigError: `head.implementation` cannot run here.
        RunError: the file is damaged, or holds a crew on other features, in another order or of other members.
    """

    def __init__(self, configs: Sequence[Config], experiment: Experiment, order: int, path: Path) -> None:
        self.members = [Member(config, experiment) for config in configs]
        self.stack = build_stack(configs, experiment, order)
        self.path = path
        self.place = (0, 0)
        self._saved_at, self._saving_took = -math.inf, 0.0
        self._marks = Marks(experiment, "val")
        marks = (experiment.fingerprint, experiment.text_fingerprint)
        self._origin = [str(order), *("" if mark is None else mark.digest for mark in marks)]
        self._origin += [config.run.dir.name for config in configs]
        saved = experiment.ranks.broadcast(lambda: folder.load_last(path))
        if saved is not None:
            self._resume(saved)
        self.selection = choose_selection(configs, experiment)
        for member in self.members:
            member.open_log(self.stack.step)
            if self.selection is not None:
                implementation, why = self.selection
                member.log("select_attend", self.stack.step, implementation=implementation, why=why)

    @property
    def config(self) -> Config:
        """Of the first member."""
        return self.members[0].config

    @property
    def resumed(self) -> bool:
        """Whether it goes on from an earlier process."""
        return self.place > (0, 0)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to learn."""
        epochs = self.config.train.epochs if self.stack.steps else 1
        return self.place[0] >= epochs or all(member.stopped for member in self.members)

    def learn(self, batch: Batch, last: bool) -> None:
        """One batch, the `last` of the epoch or not; steps are logged."""
        for member, told in zip(self.members, self.stack.learn(batch, last) or (), strict=False):
            if not member.stopped:
                member.log("step", self.stack.step, **told)
        self.place = (self.place[0], self.place[1] + 1)

    def end_epoch(self, said: Sequence[Answers]) -> None:
        """Score the members' answers to *val*, keep the best weights, and save the place."""
        epoch = self.place[0] + 1
        for number, (member, answers) in enumerate(zip(self.members, said, strict=True)):
            if not member.stopped:
                val = self._marks.accuracies(answers)
                member.end_epoch(epoch, self.stack.step, val, self.stack.weights(number))
        self.place = (epoch, 0)
        if self.done or time.monotonic() - self._saved_at > self._saving_took / SAVING_SHARE:
            self.save()

    def save(self) -> None:
        """Write the file to go on from; every rank could."""
        if not self.stack.ranks.first:
            return
        started = time.monotonic()
        state = {"place": list(self.place), "origin": self._origin, "members": [m.state() for m in self.members]}
        folder.save_last(self.path, {**state, "stack": self.stack.state()})
        self._saved_at = time.monotonic()
        self._saving_took = self._saved_at - started

    def restore_best(self, command: str) -> None:
        """Write the cards and go back to the weights that were best on *val*."""
        for number, member in enumerate(self.members):
            weights = self.stack.ranks.broadcast(partial(folder.load_weights, member.config.run.dir))
            self.stack.load_weights(number, weights)
            member.write_card(command, sum(tensor.numel() for tensor in weights.values()))

    def end(self, said: Sequence[Answers]) -> list[Metrics]:
        """Write what the members answer to *test*."""
        return [member.end(answers) for member, answers in zip(self.members, said, strict=True)]

    def close(self) -> None:
        """Close the logs."""
        for member in self.members:
            member.close_log()

    def describe(self) -> str:
        """For people."""
        return self.members[0].describe() + (f" and {len(self.members) - 1} more" if len(self.members) > 1 else "")

    def _resume(self, saved: Mapping[str, Any]) -> None:
        if saved["origin"] != self._origin:
            raise RunError(
                f"{self.path} was training on other features, or in another order, than this run would; "
                "expected the same store and command: delete it to train from the start"
            )
        self.stack.load_state(saved["stack"])
        for member, state in zip(self.members, saved["members"], strict=True):
            member.load_state(state)
        self.place = (saved["place"][0], saved["place"][1])


def choose_selection(configs: Sequence[Config], experiment: Experiment) -> tuple[str, str] | None:
    """What runs `select_attend` for these members, and why; None for heads that do not select."""
    head, sizes = configs[0].head, experiment.sizes
    if head.name != "psa":
        return None
    frame = torch.empty(1, 1, sizes.patches, sizes.width, device=experiment.device)
    return choose(frame, head.implementation, len(configs))


def build_stack(configs: Sequence[Config], experiment: Experiment, order: int) -> Stack:
    """Untrained heads with their optimiser, ready for the first step."""
    heads = []
    for config in configs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            heads.append(build_head(config, experiment.sizes).to(experiment.device))
    ranks, train = experiment.ranks, configs[0].train
    if ranks.first:
        prepare(heads, experiment.features, experiment.train_table)
    ranks.broadcast_tensors([tensor for head in heads for tensor in head.state_dict().values()])
    learns = any(parameter.requires_grad for parameter in heads[0].parameters())
    plans = (plan_batches(experiment.train_table, train.batch, order, epoch) for epoch in range(train.epochs))
    steps = sum(math.ceil(len(plan) / train.accumulate) for plan in plans) if learns else 0
    return Stack(heads, [config.train.seed for config in configs], train, steps, experiment.device, ranks)


def prepare(heads: Sequence[nn.Module], features: Features, table: QuestionTable) -> None:
    """What heads of one shape take from the training questions before the first step: answer counts, whitening."""
    tokens = None
    if isinstance(heads[0], PSA | Pooled):
        stride = max(1, len(table.clips) // MEASURED_CLIPS)
        tokens = features.tokens(table.clips[::stride][:MEASURED_CLIPS])
    for head in heads:
        if head is not heads[0] and not (isinstance(head, PSA) and head.measures_what_it_keeps):
            for buffer, same in zip(head.buffers(), heads[0].buffers(), strict=True):
                buffer.copy_(same)
            continue
        if isinstance(head, Majority):
            head.count(table)
        for module in head.modules():
            if isinstance(module, QuestionReader):
                module.whiten.measure(features.text_tokens(table))
        if isinstance(head, PSA | Pooled):
            assert tokens is not None
            head.measure(tokens)
