"""Training and evaluating heads. `train_together` is the loop; it reads from top to bottom.

A run's folder is claimed by one setting. Training stopped by a signal, a crash or a kill goes on from `last.pt` when
the same command is given again, and gives the very losses that it would have given undisturbed (bit for bit on a CPU).
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from configs.schema import Config
from train import card as folder
from train.batches import plan_batches
from train.card import Card, RunError
from train.experiment import Experiment, open_experiment
from train.log import Display
from train.member import Member, build_trainer, test_members
from train.metrics import Metrics
from train.trainer import answer_table


class Stopped(Exception):
    """A signal asked the training to stop; each `last.pt` holds its place."""


def fit(config: Config, command: str) -> Metrics:
    """Train the head that `config` describes, keep the epoch best on *val*, and evaluate that one on *test*.

    Args:
        config: the experiment.
        command: that was given, for the model card.

    Returns:
        Metrics on *test*. A run that is finished already is only evaluated again.

    Raises:
        ConfigError: the run's folder holds another setting.
        RunError: there is nothing to train or choose on, or what the folder holds is damaged.
        StoreError, DatasetError: features or annotations are missing or damaged.
        Stopped: by SIGINT or SIGTERM.
    """
    folder.claim(config.run.dir, config)
    if (config.run.dir / folder.TEST).exists():
        print(f"{config.run.dir} is trained already; evaluating its checkpoint", flush=True)
        return evaluate(config)
    experiment = open_experiment(config)
    print(experiment.features.said, flush=True)
    member = Member(config, experiment, order=config.train.seed)
    label = f"train {config.head.name} {config.data.split}"
    if member.resumed:
        print(f"{label}: going on after step {member.trainer.step} of {member.trainer.steps}", flush=True)
    try:
        train_together([member], experiment, config.train.seed, label)
    finally:
        member.log.close()
    print(f"{label}: {member.trainer.step} steps, {member.describe()}", flush=True)
    member.restore_best(command)
    return test_members([(config, member.trainer)], experiment)[0]


def train_together(members: Sequence[Member], experiment: Experiment, order: int, label: str) -> None:
    """Train every member to its end on one reading of the features: each batch is gathered once for all of them.

    Args:
        members: with the same batch size and number of epochs; each starts at its own place.
        experiment: their data.
        order: seed of the order of the batches.
        label: for people.
    """
    train, features, table = members[0].config.train, experiment.features, experiment.train_table
    steps = max(member.trainer.steps for member in members)
    epochs = train.epochs if steps else 1
    with Display(label, min(member.trainer.step for member in members), steps) as display, _signals() as asked:
        for epoch in range(min(member.place[0] for member in members), epochs):
            plan = plan_batches(table, train.batch, order, epoch) if steps else []
            first = min(member.place for member in members)[1]
            for number, batch in enumerate(features.stream(table, plan[first:]), first):
                for member in members:
                    if member.place == (epoch, number):
                        member.learn(batch)
                lead = members[0]
                display.show(lead.trainer.step, f"epoch {epoch + 1}/{epochs}, {lead.describe()}")
                if asked.is_set():
                    for member in members:
                        member.save()
                    raise Stopped(f"stopped in epoch {epoch + 1} of {epochs}; give the same command again to go on")
            due = [member for member in members if member.place[0] == epoch]
            said = answer_table([m.trainer for m in due], features, experiment.seen("val"), train.batch)
            for member, answers in zip(due, said, strict=True):
                member.end_epoch(answers)


def evaluate(config: Config) -> Metrics:
    """Evaluate the checkpoint in `config.run.dir` on *test* and write `test.json` and its companions.

    The card decides what head it is; `config` says where data and features are.

    Raises:
        RunError: there is no checkpoint, or it is another head's.
        FingerprintMismatch: the store holds other features than the head was trained on.
    """
    out, card = config.run.dir, Card.read(config.run.dir)
    if card.model != config.head.name:
        raise RunError(f"{out} holds a {card.model} head but head.name is {config.head.name!r}; check run.dir")
    known = {name: value for name, value in card.config["head"].items() if name != "implementation"}
    known["scores"] = tuple(known["scores"])
    config = replace(config, head=replace(config.head, **known), train=replace(config.train, seed=card.seed))
    experiment = open_experiment(config, card)
    trainer = build_trainer(config, experiment, order=card.seed)
    try:
        trainer.head.load_state_dict(folder.load_weights(out))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{out / folder.WEIGHTS} does not fit a {card.model} head: {reason}") from None
    return test_members([(config, trainer)], experiment)[0]


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that a step is never cut in two; a second signal stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
