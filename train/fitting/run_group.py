"""Runs that train in lockstep: their stacked heads, their position in the batches, and the file to resume from.

`fit` trains a group of one run; a sweep trains groups of many.
"""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from egopatch.configs.schema import Config
from egopatch.train.data.batch import Batch
from egopatch.train.data.question_table import plan_batches
from egopatch.train.fitting.answers import Answers, PartScorer
from egopatch.train.fitting.build_heads import build_stacked_heads, choose_selection, why_not_captured
from egopatch.train.fitting.experiment import Experiment
from egopatch.train.fitting.run import TrainingRun, write_card, write_test_results
from egopatch.train.rundir import run_folder
from egopatch.train.rundir.resume import ResumeState
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.rundir.trained_on import changed_data
from egopatch.train.scores.metrics import Metrics
from egopatch.train.steps.optim import learning_rate
from egopatch.train.steps.stacked_heads import LearnedStep

# Steps whose losses are read back from the device together: a GPU idles while its host waits for them.
STEPS_READ_TOGETHER = {"cpu": 1, "cuda": 16}
# Fraction of the time that saving at the end of epochs may take.
SAVING_SHARE = 0.05


class RunGroup:
    """Runs of one head shape on one reading of the features; claims their folders.

    Args:
        configs: Configs of the runs; they differ only in `head.ratio`, `train.seed` and `run.dir`. The first one's seed
            decides the order of the batches. The caller holds the leases of their folders.
        path: File to resume from.

    Attributes:
        heads: The stacked heads of its runs.
        position: (epoch, batch) to learn next.
        resumed: Whether an earlier process saved the position that this one began with.
        selection: Implementation of `select_attend` and why it was chosen; None for heads that do not select.
        why_not_captured: Why its steps do not become a CUDA graph; None if they do.

    Raises:
        ConfigError: `head.implementation` cannot run here, the head does not fit the store, or a folder holds a run
            with other settings.
        RunError: The file is damaged, or was saved with other features, answers or questions, another order or other
            runs; or clips that the runs were trained on have been encoded again.
    """

    def __init__(self, configs: Sequence[Config], experiment: Experiment, path: Path) -> None:
        self.runs = [TrainingRun(config, experiment) for config in configs]
        self.heads = build_stacked_heads(configs, experiment)
        self.selection = choose_selection(configs, experiment)
        # Only now: a config whose data or head is refused must not claim a folder that the corrected one needs.
        for config in configs:
            experiment.ranks.broadcast(partial(run_folder.claim, config.run.dir, config))
        self.path = path
        self.position = (0, 0)
        self._experiment = experiment
        self._unread: list[LearnedStep] = []
        self._saved_at, self._saving_took = -math.inf, 0.0
        self._scorer = PartScorer(experiment, "val")
        fingerprints = (experiment.fingerprint, experiment.text_fingerprint)
        stores = ("" if stored is None else stored.digest for stored in fingerprints)
        self._origin = (str(self.config.train.seed), *stores, *(config.run.dir.name for config in configs))
        saved = experiment.ranks.broadcast(lambda: ResumeState.read(path))
        self.resumed = saved is not None
        if saved is not None:
            self._resume(saved)
        else:
            for run in self.runs:
                run.record_data()
        self.why_not_captured = why_not_captured(configs[0], experiment) if self.heads.steps else "nothing is learned"
        for run in self.runs:
            run.open_log(self.heads.step, self.resumed)
            if self.selection is not None:
                implementation, why = self.selection
                run.log("select_attend", self.heads.step, implementation=implementation, why=why)
            if experiment.device.type == "cuda" and self.heads.steps:
                why_not = self.why_not_captured
                run.log("cuda_graph", self.heads.step, captured=why_not is None, why=why_not)

    @property
    def config(self) -> Config:
        """Config of the first run."""
        return self.runs[0].config

    @property
    def done(self) -> bool:
        """Whether all epochs are done, or every run has failed or has no patience left."""
        epochs = self.config.train.epochs if self.heads.steps else 1
        return self.position[0] >= epochs or not any(run.active for run in self.runs)

    @property
    def failed(self) -> bool:
        """Whether every run has failed."""
        return all(run.failed is not None for run in self.runs)

    def learn(self, batch: Batch, last: bool) -> None:
        """Learn from one batch; `last` marks the last batch of the epoch. Steps are logged a few at a time."""
        step = self.heads.learn(batch, last)
        if step is not None:
            self._unread.append(step)
        if last or len(self._unread) >= STEPS_READ_TOGETHER[self.heads.device.type]:
            self._log_steps()
        self.position = (self.position[0], self.position[1] + 1)

    def _log_steps(self) -> None:
        """Log the steps since the last call, and fail the runs whose loss or gradient is not finite in one of them."""
        steps, self._unread = self._unread, []
        if not steps:
            return
        values = torch.stack([step.values for step in steps]).tolist()
        for step, (losses, norms) in zip(steps, values, strict=True):
            for number, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
                if not math.isfinite(loss):
                    self._diverged(number, f"the loss is {loss}", step.number, learned=step.number > 1)
                elif not math.isfinite(norm):
                    self._diverged(number, f"the norm of the gradient is {norm}", step.number)
                elif self.runs[number].active:
                    self.runs[number].log("step", step.number, loss=loss, lr=step.rate, grad_norm=norm)

    def end_epoch(self, answers: Sequence[Answers]) -> None:
        """Score the answers of each run to *val*, keep the best weights, and save the position."""
        epoch = self.position[0] + 1
        for number, finite in enumerate(self.heads.finite()):
            if not finite:  # the last step of the epoch made them so, and no later loss can show it
                self._diverged(number, "a weight is not finite", self.heads.step)
        for number, (run, run_answers) in enumerate(zip(self.runs, answers, strict=True)):
            if run.active:
                accuracies = self._scorer.accuracies(run_answers)
                run.end_epoch(epoch, self.heads.step, accuracies, self.heads.weights(number))
        self.position = (epoch, 0)
        if self.done or time.monotonic() - self._saved_at > self._saving_took / SAVING_SHARE:
            self.save()

    def save(self) -> None:
        """Write the file to resume from, on the first rank."""
        self._log_steps()
        if not self.heads.ranks.first:
            return
        started = time.monotonic()
        runs = tuple(run.state() for run in self.runs)
        state = ResumeState(self.position, self._origin, runs, self.heads.state(), self._experiment.data_record)
        state.write(self.path)
        self._saved_at = time.monotonic()
        self._saving_took = self._saved_at - started

    def restore_best(self, command: str) -> None:
        """Write the model cards and restore the weights that were best on *val*."""
        for number, run in enumerate(self.runs):
            if run.failed is not None:
                continue
            assert run.best is not None
            load = partial(run_folder.load_weights, run.config.run.dir, run.best["epoch"])
            weights = self.heads.ranks.broadcast(load)
            self.heads.load_weights(number, weights)
            run.log_convergence()
            write_card(run.config, self._experiment, run.best, weights, command)

    def write_results(self, answers: Sequence[Answers]) -> list[Metrics]:
        """Write the answers to *test* of each run that has not failed; returns their metrics."""
        pairs = zip(self.runs, answers, strict=True)
        return [
            write_test_results(run.config, self._experiment, run_answers)
            for run, run_answers in pairs
            if run.failed is None
        ]

    def close(self) -> None:
        """Close the logs, and free the memory of the steps' graph."""
        self.heads.captured.release()
        for run in self.runs:
            run.close_log()

    def summary(self) -> str:
        """The best epoch of the first run, for the progress display."""
        return self.runs[0].summary() + (f" and {len(self.runs) - 1} more" if len(self.runs) > 1 else "")

    def _diverged(self, number: int, what: str, step: int, learned: bool = True) -> None:
        """Fail a run, unless its training has ended; the others of the stack continue.

        Args:
            what: What is not finite, and its value.
            learned: Whether a step had changed the weights before, so that the learning rate may be the cause.
        """
        run, heads, train = self.runs[number], self.heads, self.config.train
        heads.reset(number)
        if not run.active:
            return
        # A run that is trained by itself keeps its position in its own folder.
        elsewhere = "another --run.dir" if self.path.parent == run.config.run.dir else "a sweep with another --name"
        if learned:
            float32 = ", or --train.dtype float32" if heads.low_precision else ""
            lower = f"a lower --train.lr (such as {train.lr / 3:.1g}) or a longer --train.warmup{float32}"
            remedy = f"try {lower}, in {elsewhere}"
        else:
            float32 = ", or try --train.dtype float32" if heads.low_precision else ""
            remedy = (
                f"nothing has been learned yet, so the rate is not the cause: check the logits of the head "
                f"{self.config.head.name} and the store (`features verify`){float32}; then use {elsewhere}"
            )
        rate = learning_rate(step - 1, heads.steps, train)
        where = f"epoch {self.position[0] + 1}, step {step} of {heads.steps}, at learning rate {rate:.2g}"
        run.fail(f"{what} in {where}; {remedy}", step)

    def _resume(self, saved: ResumeState) -> None:
        for run in self.runs:
            self._experiment.require_trained_on(run.config.run.dir)
        # The names tell the runs of a group apart; the folder of a single run may be renamed.
        compared = slice(None) if len(self.runs) > 1 else slice(-1)
        if saved.origin[compared] != self._origin[compared]:
            raise RunError(
                f"{self.path} was saved with different features, batch order or runs; use the same store and command "
                "to resume, or delete the file to train from the start"
            )
        experiment = self._experiment
        if saved.data is None:
            changed = self._changed_since_earlier(saved)
            experiment.ranks.print_once(
                f"note: {self.path} was saved by an earlier version, which did not record the answers and "
                "questions; if the annotations have changed since, delete the file to train from the start"
            )
        else:
            changed = changed_data(saved.data, experiment.data_record)
        if changed:
            raise RunError(
                f"{self.path} was saved with different data ({'; '.join(changed)}); to resume, restore the annotations "
                f"in {self.config.data.root}, or the store if clips were encoded since; otherwise delete the file to "
                "train from the start"
            )
        then, now = _head_shapes(saved.heads["tensors"]), _head_shapes(self.heads.tensors)
        for name in sorted(then.keys() | now.keys()):
            if then.get(name) != now.get(name):
                raise RunError(
                    f"{self.path} was saved with a head of another shape ({name}: {then.get(name)} then, "
                    f"{now.get(name)} now); to resume, restore the answers and, for a head from outside, its package; "
                    "otherwise delete the file to train from the start"
                )
        self.heads.load_state(saved.heads)
        for run, state in zip(self.runs, saved.runs, strict=True):
            run.load_state(state)
        self.position = saved.position

    def _changed_since_earlier(self, saved: ResumeState) -> list[str]:
        """Evidence that the questions differ from those of a state that recorded none: its step count contradicts its
        position in the batches.
        """
        if not self.heads.steps:
            return []
        train, (epoch, batch) = self.config.train, saved.position
        batches = [
            len(plan_batches(self._experiment.train_table, train.batch, train.seed, number))
            for number in range(min(epoch + 1, train.epochs))
        ]
        batches.append(0)  # a state that was saved after the last epoch is at batch 0 of the next one
        # The last step of an epoch takes the batches that are left.
        steps = sum(math.ceil(count / train.accumulate) for count in batches[:epoch])
        steps += math.ceil(batch / train.accumulate) if batch == batches[epoch] else batch // train.accumulate
        if batch <= batches[epoch] and steps == saved.heads["step"]:
            return []
        return [f"its {saved.heads['step']} steps up to batch {batch} of epoch {epoch + 1} do not match the questions"]


def _head_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a single head, by name, from the tensors of a stack."""
    return {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
