"""Training and evaluating heads. `train_together` is the loop; it reads from top to bottom.

One config claims a run's folder, and one process leases it. After a signal, a crash or a kill, the same command
resumes training and gives exactly the losses of an uninterrupted run (bit for bit on a CPU).
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from egopatch.configs.schema import Config
from egopatch.extract.datasets import require_root
from egopatch.features.common.progress import ProgressDisplay
from egopatch.features.common.units import counted
from egopatch.features.values.errors import require_type
from egopatch.train.data.batch_size import BatchSize
from egopatch.train.data.question_table import plan_batches
from egopatch.train.fitting.answers import answer_part
from egopatch.train.fitting.experiment import Experiment, caller_state_kept, open_experiment
from egopatch.train.fitting.published import evaluate_published, has_run
from egopatch.train.fitting.run import write_test_results
from egopatch.train.fitting.run_group import RunGroup
from egopatch.train.fitting.shortage import shortage_explained
from egopatch.train.fitting.trained import open_head, trained_config
from egopatch.train.heads import check_head
from egopatch.train.processes.distributed import ALONE, Distributed
from egopatch.train.processes.stopping import Stopped, stop_signals
from egopatch.train.rundir import run_folder
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.lease import hold_when_free
from egopatch.train.rundir.names import LAST, TEST
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.scores.metrics import Metrics, headline
from egopatch.train.steps.stacked_heads import deterministic


def fit(config: Config, command: str, ranks: Distributed = ALONE) -> Metrics:
    """Train the head of `config`, keep the epoch that is best on *val*, and evaluate that one on *test*.

    Args:
        command: Command line, for the model card.
        ranks: Processes that train together, each with this same call; the first one writes.

    Returns:
        Metrics on *test*. A finished run is only evaluated again. While another process trains the run, this one
        waits until it is finished, and evaluates it; if that process ends early, this one resumes the training.

    Raises:
        TypeError: `config` is no experiment, such as the path of its file.
        ConfigError: The run's folder holds a run with other settings, or cannot be written.
        RunError: There is nothing to train or validate on, a file in the folder is damaged, the loss is not finite, the
            GPU's memory is too small, or clips were encoded again after the run had been trained on them.
        StoreError, DatasetError: Features or annotations are missing or damaged.
        Stopped: SIGINT, SIGTERM, SIGUSR1 or SIGHUP interrupted training.
        RankLost: Another rank is gone.
    """
    require_type("config", config, Config, "an experiment: load_config(path)")
    folder = config.run.dir
    check_head(config.head)
    # Before the run's folder is created, which may be in the same place as the data: a project may have been moved.
    ranks.broadcast(lambda: require_root(config.data))
    with (
        hold_when_free(folder, ranks, lambda: run_folder.require_same_settings(folder, config)),
        shortage_explained(config.train, folder),
        caller_state_kept(config.train.device),
    ):
        if ranks.broadcast(lambda: run_folder.is_finished(folder)):
            ranks.print_once(f"{folder} is already trained; evaluating its checkpoint")
            return _evaluate(config, ranks, folder)
        started = time.monotonic()
        experiment = open_experiment(config, ranks=ranks)
        for line in experiment.data_lines:
            ranks.print_once(line)
        group = RunGroup([config], experiment, folder / LAST)
        label = f"train {config.head.name} {config.data.title}"
        if group.selection is not None:
            ranks.print_once("select_attend: {} ({})".format(*group.selection))
        if group.resumed:
            ranks.print_once(f"{label}: resuming after step {group.heads.step} of {group.heads.steps}")
        try:
            train_together([group], experiment, label)
            if (why := group.runs[0].failed) is not None:
                raise RunError(why)
            ranks.print_once(f"{label}: {counted(group.heads.step, 'step')}, {group.summary()}")
            metrics = evaluate_groups([group], experiment, command)[0]
            experiment.print_quarantined()
            seconds = time.monotonic() - started
            bytes_read = sum(ranks.gather(experiment.features.bytes_read))
            group.runs[0].log("end", group.heads.step, seconds=seconds, bytes_read=bytes_read, ranks=ranks.size)
        finally:
            group.close()
        return metrics


def train_together(groups: Sequence[RunGroup], experiment: Experiment, label: str) -> None:
    """Train every run group to its end on one reading of the features: each batch is gathered once for all groups.

    Args:
        groups: Run groups with the same batch size, number of epochs and seed, hence the same batches; each starts at
            its own position.
        label: Name of the task in the progress display.
    """
    train, features, table = groups[0].config.train, experiment.features, experiment.train_table
    ranks = experiment.ranks
    steps = max(group.heads.steps for group in groups)
    first_step = min(group.heads.step for group in groups)
    epochs = train.epochs if steps else 1
    size = None
    if groups[0].why_not_captured is None:
        size = BatchSize.covering(table, plan_batches(table, train.batch, train.seed, epoch=0), train.batch)
    with (
        ProgressDisplay(label, steps, "steps", done=first_step, summary=False, silent=not ranks.first) as display,
        # torchrun repeats a signal, and kills the ranks that do not stop at the same step as the others.
        stop_signals(second_raises=ranks.size == 1) as stopping,
        # CPU threads add up the gradients of indexed tensors in any order, if these have 32,768 numbers or more.
        deterministic(train.deterministic or experiment.device.type == "cpu"),
    ):
        for epoch in range(min(group.position[0] for group in groups), epochs):
            due = [group for group in groups if group.position[0] == epoch and not group.done]
            if not due:
                continue
            plan = plan_batches(table, train.batch, train.seed, epoch) if steps else []
            first = min(group.position[1] for group in due)
            for number, batch in enumerate(features.stream(table, plan[first:], size), first):
                for group in due:
                    if group.position == (epoch, number):
                        group.learn(batch, last=number + 1 == len(plan))
                due = [group for group in due if not group.failed]
                if not due:
                    break
                display.update(due[0].heads.step, detail=f"epoch {epoch + 1}/{epochs}, {due[0].summary()}")
                if ranks.any(stopping.is_set()):
                    for group in due:
                        group.save()
                    raise Stopped(f"interrupted in epoch {epoch + 1} of {epochs}; run the same command again to resume")
            if not due:
                continue
            answers = answer_part(experiment, "val", [group.heads for group in due], keep_patches=False)
            for group, group_answers in zip(due, answers, strict=True):
                group.end_epoch(group_answers)
        if ranks.any(stopping.is_set()):  # a signal during the last evaluation
            raise Stopped("interrupted after the last epoch; run the same command again to resume")


def evaluate_groups(groups: Sequence[RunGroup], experiment: Experiment, command: str) -> list[Metrics]:
    """Write the card and the best epoch's answers to *test* for every run that has not failed; returns their
    metrics, in order. `test.json` is written last in each folder.
    """
    groups = [group for group in groups if not group.failed]
    if not groups:
        return []
    for group in groups:
        group.restore_best(command)
    answers = answer_part(experiment, "test", [group.heads for group in groups])
    pairs = zip(groups, answers, strict=True)
    return [metrics for group, group_answers in pairs for metrics in group.write_results(group_answers)]


def evaluate(
    config: Config,
    command: str = "egopatch train evaluate",
    ranks: Distributed = ALONE,
    source: Path | None = None,
) -> Metrics:
    """Evaluate the checkpoint in `config.run.dir` on *test* and write `test.json` and its companions.

    The card decides which head it is; `config` says where data and features are. If nothing was trained in the folder
    and `head.checkpoint` is set, that checkpoint is evaluated: see `train.fitting.published`.

    Args:
        command: Command line, for the model card.
        ranks: Processes that answer together.
        source: Folder of a run on another data set, whose head is evaluated on this one; results and a card are
            written to `config.run.dir`.

    Raises:
        RunError: There is no checkpoint, it belongs to another head, clips were encoded again after it had been
            trained on them, or `source` is given and a head was trained in `config.run.dir`.
        FingerprintMismatch: The store holds other features than the head was trained on.
    """
    with caller_state_kept(config.train.device):
        if source is not None:
            return _evaluate_elsewhere(config, command, ranks, source)
        if config.head.checkpoint is not None and not ranks.broadcast(lambda: has_run(config)):
            return evaluate_published(config, command, ranks)
        folder = config.run.dir
        with hold_when_free(folder, ranks, lambda: Card.read(folder)), shortage_explained(config.train, folder):
            return _evaluate(config, ranks, folder)


def test_line(config: Config, metrics: Metrics) -> str:
    """One line for people: the run, its head and data set, and the accuracies on test in percent."""
    found = headline(metrics) if metrics.all.n else "none has a published answer, so there are no accuracies"
    return f"{config.run.dir}: {config.head.name} on the {config.data.title} test questions: {found}"


def _evaluate_elsewhere(config: Config, command: str, ranks: Distributed, source: Path) -> Metrics:
    """Evaluate the head in `source` on the data set of `config`, into `config.run.dir`."""
    out, card = config.run.dir, ranks.broadcast(lambda: Card.read(source))
    ranks.broadcast(lambda: require_root(config.data))
    with (
        hold_when_free(out, ranks, lambda: run_folder.require_untrained(out)),
        shortage_explained(config.train, out),
    ):
        # The card keeps the evaluated head's options, training and data: the table tells runs apart by them.
        trained = {section: card.config[section] for section in ("head", "train")}
        here = run_folder.plain(config) | trained
        new_card = replace(
            card,
            config=here,
            command=command,
            synthetic=run_folder.is_rendered(config.data.root),
            trained_on=None if here["data"] == card.config["data"] else card.config["data"],
        )
        return _evaluate(config, ranks, source, new_card)


def _evaluate(config: Config, ranks: Distributed, source: Path, new_card: Card | None = None) -> Metrics:
    """Evaluate the checkpoint in `source`; the caller holds the lease of `config.run.dir`, which gets `new_card`."""
    card = ranks.broadcast(lambda: Card.read(source))
    if card.model != config.head.name:
        raise RunError(f"{source} holds a {card.model} head but head.name is {config.head.name!r}; check run.dir")
    config = trained_config(config, card)
    # Refusals of the head name the folder that it is in.
    experiment = open_experiment(replace(config, run=replace(config.run, dir=source)), card, ranks)
    if source == config.run.dir:
        experiment.require_trained_on(source)
    _, heads = open_head(config, source, card, experiment.sizes, experiment.device, ranks)
    ((answers,),) = answer_part(experiment, "test", [heads])
    if new_card is not None and ranks.first:
        # Results of a head that was evaluated into this folder before would be taken for those of the new card.
        (config.run.dir / TEST).unlink(missing_ok=True)
        new_card.write(config.run.dir)
    metrics = write_test_results(config, experiment, answers)
    experiment.print_quarantined()
    return metrics
