"""One run's folder while its head is trained and when it is evaluated. The loop over batches is in `run.py`."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from configs.schema import Config
from extract.encoders.checkpoint import PUBLISHED
from train import card as folder
from train.batches import FORMS, QuestionTable, plan_batches
from train.card import Card, RunError
from train.experiment import Experiment
from train.heads import BLIND, build_head
from train.log import RunLog
from train.metrics import Metrics, score
from train.trainer import Answers, Trainer, answer_table, prepare


class Member:
    """A head in training and its folder: started or resumed, logged, saved, finished.

    Args:
        config: of this run; its folder is claimed already.
        experiment: shared with the other members of a sweep.
        order: seed of the order of the batches, which members share.

    Attributes:
        place: (epoch, batch) that it learns next.
        best: epoch and accuracies of the best epoch on *val* so far.

    Raises:
        RunError: the folder was training on other features or in another order, or is damaged.
    """

    def __init__(self, config: Config, experiment: Experiment, order: int) -> None:
        self.config = config
        self.experiment = experiment
        self.trainer = build_trainer(config, experiment, order)
        self.place = (0, 0)
        self.best: dict[str, Any] | None = None
        marks = (experiment.fingerprint, experiment.text_fingerprint)
        self._origin = [str(order), *("" if mark is None else mark.digest for mark in marks)]
        out = config.run.dir
        saved = folder.load_last(out)
        if saved is None:
            prepare(self.trainer.head, experiment.features, experiment.train_table)
            (out / folder.LOG).unlink(missing_ok=True)
        else:
            self._resume(saved)
        self.log = RunLog(out, self.trainer.step)

    @property
    def resumed(self) -> bool:
        """Whether it goes on from an earlier process."""
        return self.trainer.step > 0 or self.place > (0, 0)

    def learn(self, batch: Any) -> None:
        """One step, logged."""
        self.log.write("step", self.trainer.step + 1, **self.trainer.learn(batch))
        self.place = (self.place[0], self.place[1] + 1)

    def end_epoch(self, said: Answers) -> None:
        """Score its answers to *val*, keep the weights if they are the best so far, and save its place."""
        val = score_part(self.experiment, "val", said)[0]
        numbers = {"open": val.open.accuracy, "binary": val.binary.accuracy, "all": val.all.accuracy}
        epoch = self.place[0] + 1
        self.log.write("val", self.trainer.step, epoch=epoch, **numbers)
        if self.best is None or (numbers["all"] or 0.0) > (self.best["all"] or 0.0):
            folder.save_weights(self.config.run.dir, self.trainer.head.state_dict())
            self.best = {"epoch": epoch, **numbers}
        self.place = (epoch, 0)
        self.save()

    def save(self) -> None:
        """Write `last.pt`."""
        state = {"place": list(self.place), "best": self.best, "origin": self._origin}
        folder.save_last(self.config.run.dir, {**state, **self.trainer.state()})

    def restore_best(self, command: str) -> None:
        """Write the card and go back to the weights that were best on *val*."""
        assert self.best is not None
        marks = (self.experiment.fingerprint, self.experiment.text_fingerprint)
        Card(
            model=self.config.head.name,
            config=folder.plain(self.config),
            fingerprint=None if marks[0] is None else dict(marks[0].fields),
            text_fingerprint=None if marks[1] is None else dict(marks[1].fields),
            answers=self.experiment.dataset.answers,
            seed=self.config.train.seed,
            best_epoch=self.best["epoch"],
            val={name: self.best[name] for name in ("open", "binary", "all")},
            versions=folder.versions(),
            command=command,
            parameters=sum(p.numel() for p in self.trainer.head.parameters()),
        ).write(self.config.run.dir)
        self.trainer.head.load_state_dict(folder.load_weights(self.config.run.dir))

    def describe(self) -> str:
        """The best epoch so far, for people."""
        if self.best is None:
            return "no val yet"
        return f"best val all {self.best['all']:.2f} (epoch {self.best['epoch']})"

    def _resume(self, saved: Mapping[str, Any]) -> None:
        if saved["origin"] != self._origin:
            raise RunError(
                f"{self.config.run.dir} was training on other features, or in another order, than this run would; "
                "expected the same store and command: delete the folder to train from the start"
            )
        self.trainer.load_state(saved)
        self.place = (saved["place"][0], saved["place"][1])
        self.best = saved["best"]


def build_trainer(config: Config, experiment: Experiment, order: int) -> Trainer:
    """An untrained head with its optimiser."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        head = build_head(config, experiment.sizes).to(experiment.device)
    learns = any(parameter.requires_grad for parameter in head.parameters())
    epochs, size = config.train.epochs if learns else 0, config.train.batch
    steps = sum(len(plan_batches(experiment.train_table, size, order, epoch)) for epoch in range(epochs))
    return Trainer(head, config.train, steps, experiment.device)


def test_members(trainers: Sequence[tuple[Config, Trainer]], experiment: Experiment) -> list[Metrics]:
    """Metrics on *test* of each, with predictions and selections, in each run's folder; `test.json` comes last."""
    size = trainers[0][0].train.batch
    table = experiment.seen("test")
    said = answer_table([trainer for _, trainer in trainers], experiment.features, table, size)
    results = []
    for (config, _), answers in zip(trainers, said, strict=True):
        out = config.run.dir
        metrics, texts = score_part(experiment, "test", answers)
        lines = [json.dumps({"question_id": name, "answer": answer}) + "\n" for name, answer in texts.items()]
        folder.write_whole(out / folder.PREDICTIONS, "".join(lines))
        if answers.kept is not None:
            content = io.BytesIO()
            names = np.array([question.question_id for question in table.questions])
            np.savez_compressed(content, question_ids=names, kept=answers.kept)
            folder.write_whole(out / folder.SELECTION, content.getvalue())
        result = {"model": row_name(config), "split": config.data.split, "seed": config.train.seed}
        result |= {**metrics.as_json(), "unseen": len(experiment.tables["test"]) - len(table)}
        folder.write_whole(out / folder.TEST, json.dumps(result, indent=2) + "\n")
        results.append(metrics)
    return results


def row_name(config: Config) -> str:
    """What the table calls a run: its head, with the encoder's name where that is none of the published networks."""
    name, arch = config.head.name, config.encoder.arch
    return name if name in BLIND or arch in PUBLISHED else f"{name} ({arch})"


def score_part(experiment: Experiment, part: str, said: Answers) -> tuple[Metrics, dict[str, str]]:
    """Metrics over every question of `part`, and the answers as text; where the clip is quarantined, the majority's."""
    vocabulary, table = experiment.dataset.answers, experiment.tables[part]
    seen = {
        question.question_id: vocabulary[answer]
        for question, answer in zip(experiment.seen(part).questions, said.classes.tolist(), strict=True)
    }
    fallback = _majority(experiment.train_table, vocabulary)
    texts = {q.question_id: seen.get(q.question_id, fallback[q.form]) for q in table.questions}
    return score(table.questions, texts, experiment.dataset.split), texts


def _majority(table: QuestionTable, vocabulary: Sequence[str]) -> dict[str, str]:
    most = {}
    for index, form in enumerate(FORMS):
        answers = table.answer[table.form == index]
        most[form] = vocabulary[int(torch.bincount(answers if len(answers) else table.answer).argmax())]
    return most
