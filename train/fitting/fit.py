"""Training and evaluating heads. `train_together` is the loop; it reads from top to bottom.

A run's folder is claimed by one setting and leased by one process. Training stopped by a signal, a crash or a kill goes
on when the same command is given again, and gives the very losses that it would have given undisturbed (bit for bit on
a CPU).
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from egopatch.configs.schema import Config, HeadConfig
from egopatch.features.io import file_lease as lease
from egopatch.train.data.question_table import plan_batches
from egopatch.train.fitting.answers import answer_table
from egopatch.train.fitting.experiment import Experiment, open_experiment
from egopatch.train.fitting.published import evaluate_published, has_run
from egopatch.train.fitting.run import Member
from egopatch.train.fitting.run_group import Crew, build_stack
from egopatch.train.fitting.stacked_heads import deterministic
from egopatch.train.processes.distributed import ALONE, Distributed
from egopatch.train.processes.stopping import Stopped, stop_signals
from egopatch.train.rundir import card as folder
from egopatch.train.rundir.card import Card, RunError
from egopatch.train.rundir.log import Display
from egopatch.train.scores.metrics import Metrics


def fit(config: Config, command: str, ranks: Distributed = ALONE) -> Metrics:
    """Train the head that `config` describes, keep the epoch best on *val*, and evaluate that one on *test*.

    Args:
        config: the experiment.
        command: that was given, for the model card.
        ranks: processes that train it together, each with this very call; the first one writes.

    Returns:
        Metrics on *test*. A run that is finished already is only evaluated again.

    Raises:
        ConfigError: the run's folder holds another setting.
        RunError: there is nothing to train or choose on, or what the folder holds is damaged.
        ShardOwned: another process is training in the folder.
        StoreError, DatasetError: features or annotations are missing or damaged.
        Stopped: by SIGINT or SIGTERM.
        RankLost: another rank is gone.
    """
    started = time.monotonic()
    with ExitStack() as leases:
        # Of many ranks the first one alone looks at the folder.
        if ranks.broadcast(lambda: _trained_or_taken(config, leases)):
            ranks.print_once(f"{config.run.dir} is trained already; evaluating its checkpoint")
            return evaluate(config, ranks=ranks)
        experiment = open_experiment(config, ranks=ranks)
        ranks.print_once(experiment.features.residency_line)
        crew = Crew([config], experiment, config.train.seed, config.run.dir / folder.LAST)
        label = f"train {config.head.name} {config.data.split}"
        if crew.selection is not None:
            ranks.print_once("select_attend: {} ({})".format(*crew.selection))
        if crew.resumed:
            ranks.print_once(f"{label}: going on after step {crew.stack.step} of {crew.stack.steps}")
        try:
            train_together([crew], experiment, config.train.seed, label)
            ranks.print_once(f"{label}: {crew.stack.step} steps, {crew.describe()}")
            metrics = test_crews([crew], experiment, command)[0]
            took = time.monotonic() - started
            nbytes = sum(ranks.gather(experiment.features.bytes_read))
            crew.members[0].log("end", crew.stack.step, seconds=took, bytes_read=nbytes, ranks=ranks.size)
        finally:
            crew.close()
        return metrics


def train_together(crews: Sequence[Crew], experiment: Experiment, order: int, label: str) -> None:
    """Train every crew to its end on one reading of the features: each batch is gathered once for all of them.

    Args:
        crews: with the same batch size and number of epochs; each starts at its own place.
        experiment: their data.
        order: seed of the order of the batches.
        label: for people.
    """
    train, features, table = crews[0].config.train, experiment.features, experiment.train_table
    ranks = experiment.ranks
    steps = max(crew.stack.steps for crew in crews)
    first_step = min(crew.stack.step for crew in crews)
    epochs = train.epochs if steps else 1
    with (
        Display(label, first_step, steps, silent=not ranks.first) as display,
        # torchrun repeats a signal, and kills the ranks that do not stop at the same step as the others.
        stop_signals(second_raises=ranks.size == 1) as stopping,
        deterministic(train.deterministic),
    ):
        for epoch in range(min(crew.place[0] for crew in crews), epochs):
            due = [crew for crew in crews if crew.place[0] == epoch and not crew.done]
            if not due:
                continue
            plan = plan_batches(table, train.batch, order, epoch) if steps else []
            first = min(crew.place[1] for crew in due)
            for number, batch in enumerate(features.stream(table, plan[first:]), first):
                for crew in due:
                    if crew.place == (epoch, number):
                        crew.learn(batch, last=number + 1 == len(plan))
                display.show(due[0].stack.step, f"epoch {epoch + 1}/{epochs}, {due[0].describe()}")
                if ranks.any(stopping.is_set()):
                    for crew in due:
                        crew.save()
                    raise Stopped(f"stopped in epoch {epoch + 1} of {epochs}; give the same command again to go on")
            stacks, seen = [crew.stack for crew in due], experiment.encoded("val")
            said = answer_table(stacks, features, seen, train.batch, keep_patches=False)
            for crew, answers in zip(due, said, strict=True):
                crew.end_epoch(answers)


def test_crews(crews: Sequence[Crew], experiment: Experiment, command: str) -> list[Metrics]:
    """Metrics on *test* of every member's best epoch, in order; `test.json` comes last into each folder."""
    for crew in crews:
        crew.restore_best(command)
    size = crews[0].config.train.batch
    stacks = [crew.stack for crew in crews]
    said = answer_table(stacks, experiment.features, experiment.encoded("test"), size)
    return [metrics for crew, answers in zip(crews, said, strict=True) for metrics in crew.end(answers)]


def evaluate(config: Config, command: str = "python -m train evaluate", ranks: Distributed = ALONE) -> Metrics:
    """Evaluate the checkpoint in `config.run.dir` on *test* and write `test.json` and its companions.

    The card decides what head it is; `config` says where data and features are. Where nothing was trained in the
    folder and there is a `head.checkpoint`, that is evaluated: see `train.fitting.published`.

    Raises:
        RunError: there is no checkpoint, or it is another head's.
        FingerprintMismatch: the store holds other features than the head was trained on.
    """
    if config.head.checkpoint is not None and not ranks.broadcast(lambda: has_run(config)):
        return evaluate_published(config, command, ranks)
    out, card = config.run.dir, ranks.broadcast(lambda: Card.read(config.run.dir))
    if card.model != config.head.name:
        raise RunError(f"{out} holds a {card.model} head but head.name is {config.head.name!r}; check run.dir")
    train = replace(config.train, seed=card.seed, ema=0.0)
    config = replace(config, head=_head_of(card, config.head), train=train)
    experiment = open_experiment(config, card, ranks)
    stack = build_stack([config], experiment, order=card.seed)
    try:
        stack.load_weights(0, ranks.broadcast(lambda: folder.load_weights(out)))
    except ValueError as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{out / folder.WEIGHTS} does not fit a {card.model} head: {error}") from None
    said = answer_table([stack], experiment.features, experiment.encoded("test"), config.train.batch)
    return Member(config, experiment).end(said[0][0])


def _trained_or_taken(config: Config, leases: ExitStack) -> bool:
    """Whether the run is finished; if not, its folder is claimed and leased."""
    folder.claim(config.run.dir, config)
    if (config.run.dir / folder.TEST).exists():
        return True
    leases.enter_context(lease.hold(config.run.dir, 0))
    return False


def _head_of(card: Card, here: HeadConfig) -> HeadConfig:
    """The card's options, but for how fast they are computed."""
    known: dict[str, Any] = {}
    for field in fields(HeadConfig):
        value = card.config["head"].get(field.name, getattr(here, field.name))
        known[field.name] = tuple(value) if isinstance(value, list) else value
    checkpoint = known["checkpoint"]
    known |= {"implementation": here.implementation, "checkpoint": None if checkpoint is None else Path(checkpoint)}
    return HeadConfig(**known)
