"""One run's folder while its head is trained and when it is evaluated."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from egopatch.configs.schema import Config
from egopatch.extract.encoders.checkpoints.checkpoint import PUBLISHED_NETWORKS
from egopatch.train.fitting.answers import Answers, score_part
from egopatch.train.fitting.experiment import Experiment
from egopatch.train.heads import BLIND
from egopatch.train.rundir import card as folder
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.log import RunLog
from egopatch.train.scores.metrics import Metrics


class Member:
    """A run's log, its best epoch so far, and what it leaves behind; of many ranks the first writes.

    Args:
        config: of this run; its folder is claimed already.
        experiment: its data.

    Attributes:
        best: epoch and accuracies of the best epoch on *val* so far.
        waited: epochs since.
        stopped: whether `train.patience` has run out; what the head learns after that does not count.
    """

    def __init__(self, config: Config, experiment: Experiment) -> None:
        self.config = config
        self.experiment = experiment
        self.best: dict[str, Any] | None = None
        self.waited = 0
        self._log: RunLog | None = None

    @property
    def stopped(self) -> bool:
        """Whether `train.patience` has run out."""
        patience = self.config.train.patience
        return patience is not None and self.waited >= patience

    @property
    def _writes(self) -> bool:
        return self.experiment.ranks.first

    def open_log(self, step: int) -> None:
        """Start the log after `step`; what an interrupted run wrote later is dropped."""
        if not self._writes:
            return
        if step == 0:
            (self.config.run.dir / folder.LOG).unlink(missing_ok=True)
        self._log = RunLog(self.config.run.dir, step)

    def log(self, event: str, step: int, **values: Any) -> None:
        """One line of the log."""
        if not self._writes:
            return
        assert self._log is not None
        self._log.write(event, step, **values)

    def close_log(self) -> None:
        """Write out what is pending."""
        if self._log is not None:
            self._log.close()

    def end_epoch(
        self, epoch: int, step: int, numbers: Mapping[str, float | None], weights: Mapping[str, Tensor]
    ) -> None:
        """Log its accuracies on *val* after `epoch` (from 1) and keep `weights` if they are the best so far."""
        self.log("val", step, epoch=epoch, **numbers)
        self.waited += 1
        if self.best is None or (numbers["all"] or 0.0) > (self.best["all"] or 0.0):
            if self._writes:
                folder.save_weights(self.config.run.dir, weights)
            self.best, self.waited = {"epoch": epoch, **numbers}, 0

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on."""
        return {"best": self.best, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.best, self.waited = state["best"], state["waited"]

    def write_card(self, command: str, parameters: int) -> None:
        """Write the model card of the best epoch."""
        if not self._writes:
            return
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
            parameters=parameters,
        ).write(self.config.run.dir)

    def end(self, said: Answers) -> Metrics:
        """Write its answers to *test*, what it selected and, last, `test.json`; returns the metrics."""
        out, experiment = self.config.run.dir, self.experiment
        metrics, texts = score_part(experiment, "test", said)
        if not self._writes:
            return metrics
        lines = [json.dumps({"question_id": name, "answer": answer}) + "\n" for name, answer in texts.items()]
        folder.write_whole(out / folder.PREDICTIONS, "".join(lines))
        table = experiment.encoded("test")
        if said.kept is not None:
            content = io.BytesIO()
            names = np.array([question.question_id for question in table.questions])
            np.savez_compressed(content, question_ids=names, kept=said.kept)
            folder.write_whole(out / folder.SELECTION, content.getvalue())
        config = self.config
        result = {"model": row_name(config), "split": config.data.split, "seed": config.train.seed}
        result |= {**metrics.as_json(), "unseen": len(experiment.tables["test"]) - len(table)}
        folder.write_whole(out / folder.TEST, json.dumps(result, indent=2) + "\n")
        return metrics

    def describe(self) -> str:
        """The best epoch so far, for people."""
        if self.best is None:
            return "no val yet"
        return f"best val all {self.best['all']:.2f} (epoch {self.best['epoch']})"


def row_name(config: Config) -> str:
    """What the table calls a run: its head, with the encoder's name where that is none of the published networks."""
    name, arch = config.head.name, config.encoder.arch
    return name if name in BLIND or arch in PUBLISHED_NETWORKS else f"{name} ({arch})"
