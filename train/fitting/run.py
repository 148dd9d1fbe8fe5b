"""Writes the folder of one run: its log and best weights in training, then the model card and the results on *test*."""

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Question
from egopatch.extract.encoders.checkpoints.checkpoint import PUBLISHED_NETWORKS
from egopatch.features import Fingerprint
from egopatch.train.fitting.answers import Answers, score_part
from egopatch.train.fitting.experiment import Experiment
from egopatch.train.heads import package_versions
from egopatch.train.rundir import run_folder
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.log import RunLog
from egopatch.train.rundir.names import (
    LOG,
    PREDICTIONS,
    SELECTION,
    SUBMISSION,
    SUBMISSION_CSV,
    TEST,
    TRACKING,
    WEIGHTS,
)
from egopatch.train.rundir.results import BLIND
from egopatch.train.rundir.tracking import open_tracker
from egopatch.train.rundir.trained_on import write_clips, write_questions
from egopatch.train.scores.metrics import Metrics

# Share of the best accuracy on *val* at which a run counts as converged.
CONVERGED = 0.95


class TrainingRun:
    """The log and the best epoch so far of one run that is trained; only the first rank writes.

    Args:
        config: Config of this run.

    Attributes:
        best: Epoch and accuracies of the best epoch on *val* so far.
        epochs_since_best: Number of epochs after the best one.
        curve: Step, seconds of training and accuracy on *val* at the end of each epoch.
        failed: Why the run cannot be trained to its end; None if it can.
    """

    def __init__(self, config: Config, experiment: Experiment) -> None:
        self.config = config
        self.experiment = experiment
        self.best: dict[str, Any] | None = None
        self.epochs_since_best = 0
        self.curve: list[tuple[int, float, float]] = []
        self._started = time.monotonic()
        self.failed: str | None = None
        self._best_weights: dict[str, Tensor] | None = None
        self._log: RunLog | None = None

    @property
    def active(self) -> bool:
        """Whether the run still learns; once it has failed, or `train.patience` has run out, later epochs of its head
        are not logged and never become the best.
        """
        patience = self.config.train.patience
        return self.failed is None and (patience is None or self.epochs_since_best < patience)

    @property
    def _writes(self) -> bool:
        return self.experiment.ranks.first

    def open_log(self, step: int, resumed: bool) -> None:
        """Open the log after `step`. A resumed run drops the log's later lines; any other run starts a new log."""
        if not self._writes:
            return
        folder, name = self.config.run.dir, self.config.run.tracker
        if not resumed:
            for former in (LOG, TRACKING):
                (folder / former).unlink(missing_ok=True)
        tracker = None if name is None else open_tracker(name, folder, run_folder.plain(self.config))
        self._log = RunLog(folder, step, tracker)

    def record_data(self) -> None:
        """Write which questions the run is about to be trained on, and what their clips are made of."""
        folder, experiment = self.config.run.dir, self.experiment
        if not self._writes:
            return
        write_questions(folder, experiment.data_record)
        if experiment.clip_versions is not None:
            write_clips(folder, experiment.clip_versions)

    def log(self, event: str, step: int, **values: Any) -> None:
        """Write one line of the log."""
        if not self._writes:
            return
        assert self._log is not None
        self._log.write(event, step, **values)

    def close_log(self) -> None:
        """Flush and close the log."""
        if self._log is not None:
            self._log.close()

    def end_epoch(
        self, epoch: int, step: int, accuracies: Mapping[str, float | None], weights: Mapping[str, Tensor]
    ) -> None:
        """Log the `accuracies` on *val* after `epoch` (from 1), and keep `weights` if they are the best so far."""
        self.log("val", step, epoch=epoch, **accuracies)
        self.curve.append((step, self._seconds(), accuracies["all"] or 0.0))
        self.epochs_since_best += 1
        if self.best is None or (accuracies["all"] or 0.0) > (self.best["all"] or 0.0):
            self.best, self.epochs_since_best = {"epoch": epoch, **accuracies}, 0
            if self._writes:
                self._best_weights = {name: tensor.cpu().clone() for name, tensor in weights.items()}
                run_folder.save_weights(self.config.run.dir, self._best_weights, epoch)

    def fail(self, why: str, step: int) -> None:
        """End the run without results."""
        self.failed = f"{self.config.run.dir}: {why}"
        self.log("failed", step, why=why)

    def state(self) -> dict[str, Any]:
        """State from which a later process resumes."""
        return {
            "best": self.best,
            "curve": self.curve,
            "seconds": self._seconds(),
            "waited": self.epochs_since_best,
            "failed": self.failed,
            "weights": self._best_weights,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from `state`; its best weights replace those in the folder if these are of another epoch.

        Raises:
            RunError: An earlier version saved `state`, and the weights in the folder do not belong to it.
        """
        self.best, self.epochs_since_best, self.failed = state["best"], state["waited"], state.get("failed")
        # Earlier versions saved neither.
        self.curve = [tuple(point) for point in state.get("curve", [])]
        self._started = time.monotonic() - state.get("seconds", 0.0)
        if self._writes and self.best is not None:
            self._restore_weights(self.best["epoch"], state.get("weights"))

    def _restore_weights(self, epoch: int, weights: dict[str, Tensor] | None) -> None:
        folder = self.config.run.dir
        if weights is None:  # saved by an earlier version, which kept the weights only in their own file
            self._best_weights = run_folder.load_weights(folder, epoch)
            return
        self._best_weights = weights
        found = run_folder.weights_epoch(folder)
        if found != epoch:
            what = "holds no weights of a known epoch" if found is None else f"holds the weights of epoch {found}"
            print(
                f"{folder / WEIGHTS} {what}, but the best epoch of the state to resume from is {epoch}: "
                f"going back to the weights of epoch {epoch}",
                flush=True,
            )
            run_folder.save_weights(folder, weights, epoch)

    def log_convergence(self) -> None:
        """Log when the accuracy on *val* first reached 95% of its best: `steps` and `seconds` of training of
        the whole stack.
        """
        if self.best is None:
            return
        enough = CONVERGED * (self.best["all"] or 0.0)
        for step, seconds, accuracy in self.curve:
            if accuracy >= enough:
                self.log("converged", self.curve[-1][0], steps=step, seconds=round(seconds, 3))
                return

    def _seconds(self) -> float:
        """Seconds of training so far, without the time between an interruption and resuming."""
        return time.monotonic() - self._started

    def summary(self) -> str:
        """The best epoch so far, for the progress display."""
        if self.best is None:
            return "no val yet"
        return f"best val all {self.best['all']:.2f} (epoch {self.best['epoch']})"


def write_card(
    config: Config, experiment: Experiment, best: Mapping[str, Any], weights: Mapping[str, Tensor], command: str
) -> None:
    """Write the model card of a run, on the first rank.

    Args:
        best: Epoch that was best on *val*, and its accuracies, as `TrainingRun.best`.
        weights: The head's weights after that epoch.
        command: Command line.
    """
    if not experiment.ranks.first:
        return
    Card(
        model=config.head.name,
        config=run_folder.plain(config),
        fingerprint=_fields(experiment.fingerprint),
        text_fingerprint=_fields(experiment.text_fingerprint),
        answers=experiment.dataset.answers,
        seed=config.train.seed,
        best_epoch=best["epoch"],
        val={name: best[name] for name in ("open", "binary", "all")},
        versions=run_folder.versions() | package_versions(config.head.name),
        command=command,
        parameters=sum(tensor.numel() for tensor in weights.values()),
        synthetic=run_folder.is_rendered(config.data.root),
    ).write(config.run.dir)


def write_test_results(config: Config, experiment: Experiment, answers: Answers) -> Metrics:
    """Write the answers to *test*, the selected patches and, last, `test.json`, on the first rank; returns the
    metrics.
    """
    out = config.run.dir
    metrics, texts = score_part(experiment, "test", answers)
    if not experiment.ranks.first:
        return metrics
    lines = [json.dumps({"question_id": name, "answer": answer}) + "\n" for name, answer in texts.items()]
    run_folder.write_whole(out / PREDICTIONS, "".join(lines))
    _write_submission(out, experiment.tables["test"].questions, texts)
    if answers.kept is not None:
        content = io.BytesIO()
        names = np.array([question.question_id for question in experiment.encoded["test"].questions])
        np.savez_compressed(content, question_ids=names, kept=answers.kept)
        run_folder.write_whole(out / SELECTION, content.getvalue())
    else:  # another head with a selection may have been evaluated into this folder before
        (out / SELECTION).unlink(missing_ok=True)
    result = {
        "model": system_name(config),
        "split": config.data.split,
        "seed": config.train.seed,
        **metrics.as_json(),
        "wrong_form": metrics.wrong_form,
        "unseen": metrics.quarantined,
    }
    run_folder.write_whole(out / TEST, json.dumps(result, indent=2) + "\n")
    return metrics


def _write_submission(out: Path, questions: Sequence[Question], answers: Mapping[str, str]) -> None:
    """Write the chosen options' indices for the server of a benchmark that does not publish all right answers.

    `submission.json` is `{question_id: index}`, `submission.csv` has the columns `q_uid,answer`.
    """
    if all(question.answer for question in questions):
        for former in (SUBMISSION, SUBMISSION_CSV):
            (out / former).unlink(missing_ok=True)
        return
    indices = {q.question_id: q.options.index(answers[q.question_id]) for q in questions}
    run_folder.write_whole(out / SUBMISSION, json.dumps(indices, indent=0) + "\n")
    rows = "".join(f"{name},{index}\n" for name, index in indices.items())
    run_folder.write_whole(out / SUBMISSION_CSV, f"q_uid,answer\n{rows}")


def system_name(config: Config) -> str:
    """System of a run in the results table: its head, with the encoder's name unless that is a published network."""
    name, arch = config.head.name, config.encoder.arch
    return name if name in BLIND or arch in PUBLISHED_NETWORKS else f"{name} ({arch})"


def _fields(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    return None if fingerprint is None else dict(fingerprint.fields)
