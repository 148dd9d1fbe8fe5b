"""Training one head and evaluating it. `fit` is the loop; it reads from top to bottom.

A run's folder is claimed by one setting. Training stopped by a signal, a crash or a kill goes on from `last.pt` when
the same command is given again, and gives the very losses that it would have given undisturbed (bit for bit on a CPU).
"""

import io
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import torch

from configs.schema import Config
from train import card as folder
from train.batches import FORMS, NO_CLASS, QuestionTable, plan_batches
from train.card import Card, RunError
from train.experiment import Experiment, open_experiment
from train.heads import build_head
from train.log import RunLog
from train.metrics import Metrics, score
from train.trainer import Answers, Trainer, prepare


class Stopped(Exception):
    """A signal asked the training to stop; `last.pt` holds the place."""


def fit(config: Config, command: str) -> Metrics:
    """Train the head that `config` describes, keep the epoch best on *val*, and evaluate that one on *test*.

    Args:
        config: the experiment.
        command: that was given, for the model card.

    Returns:
        Metrics on *test*. A run that is finished already is not trained again.

    Raises:
        RunError: the run's folder holds another setting, or there is nothing to train or choose on.
        StoreError, DatasetError: features or annotations are missing or damaged.
        Stopped: by SIGINT or SIGTERM.
    """
    out = config.run.dir
    folder.claim(out, config)
    if (out / folder.TEST).exists():
        print(f"{out} is finished already; evaluating its checkpoint again trains nothing", flush=True)
        return evaluate(config)
    experiment = open_experiment(config)
    features = experiment.features
    print(features.said, flush=True)
    train_table = experiment.tables["train"].encoded(features.unseen).answerable()
    if not len(train_table) or not len(experiment.tables["val"]):
        raise RunError(
            f"{config.data.root} has {len(train_table)} questions to train on and {len(experiment.tables['val'])} to "
            "choose the checkpoint by; expected some of both: check data.root and data.split"
        )
    trainer, epochs = start(config, experiment, train_table)
    state: dict[str, Any] = {"epoch": 0, "batch": 0, "best": None, "digests": _digests(experiment)}
    if (saved := folder.load_last(out)) is not None:
        state = _resume(config, trainer, saved, state["digests"])
    else:
        prepare(trainer.head, features, train_table)
        (out / folder.LOG).unlink(missing_ok=True)
    label = f"train {config.head.name} {config.data.split}"
    with RunLog(out, trainer.step, trainer.steps, label) as log, _signals() as asked:
        for epoch in range(state["epoch"], epochs):
            plan = plan_batches(train_table, config.train.batch, config.train.seed, epoch) if trainer.steps else []
            for position, batch in enumerate(features.stream(train_table, plan[state["batch"] :]), state["batch"] + 1):
                log.write("step", trainer.step, **trainer.learn(batch))
                log.show(trainer.step, f"epoch {epoch + 1}/{epochs}, {_best(state)}")
                if asked.is_set():
                    folder.save_last(out, {**state, "epoch": epoch, "batch": position, **trainer.state()})
                    raise Stopped(f"stopped in epoch {epoch + 1} of {epochs}; give the same command again to go on")
            val = _metrics(experiment, "val", trainer.answer(features, _seen(experiment, "val")), train_table)
            numbers = {"open": val.open.accuracy, "binary": val.binary.accuracy, "all": val.all.accuracy}
            log.write("val", trainer.step, epoch=epoch + 1, **numbers)
            if state["best"] is None or (numbers["all"] or 0.0) > (state["best"]["all"] or 0.0):
                folder.save_weights(out, trainer.head.state_dict())
                state["best"] = {"epoch": epoch + 1, **numbers}
            state |= {"epoch": epoch + 1, "batch": 0}
            folder.save_last(out, {**state, **trainer.state()})
            log.show(trainer.step, _best(state))
        log.say(f"{label}: {epochs} epochs, {trainer.step} steps, {_best(state)}")
    model_card(config, experiment, trainer, state["best"], command).write(out)
    trainer.head.load_state_dict(folder.load_weights(out))
    return _test(config, experiment, trainer, train_table)


def start(config: Config, experiment: Experiment, train_table: QuestionTable) -> tuple[Trainer, int]:
    """An untrained head with its optimiser, and the number of epochs: one where nothing is learned by gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        head = build_head(config, experiment.sizes).to(experiment.device)
    learns = any(parameter.requires_grad for parameter in head.parameters())
    epochs = config.train.epochs if learns else 1
    seed = config.train.seed
    steps = sum(len(plan_batches(train_table, config.train.batch, seed, epoch)) for epoch in range(epochs))
    return Trainer(head, config.train, steps if learns else 0, experiment.device), epochs


def evaluate(config: Config) -> Metrics:
    """Evaluate the checkpoint in `config.run.dir` on *test* and write `test.json` and its companions.

    The card decides what head it is; `config` says where data and features are.

    Raises:
        RunError: there is no checkpoint, or it is another head's.
        FingerprintMismatch: the store holds other features than the head was trained on.
    """
    card = Card.read(config.run.dir)
    if card.model != config.head.name:
        raise RunError(
            f"{config.run.dir} holds a {card.model} head; head.name is {config.head.name!r}: pass its run.dir"
        )
    known = {name: value for name, value in card.config["head"].items() if name != "implementation"}
    known["scores"] = tuple(known["scores"])
    config = replace(config, head=replace(config.head, **known), train=replace(config.train, seed=card.seed))
    experiment = open_experiment(config, card)
    train_table = experiment.tables["train"].encoded(experiment.features.unseen).answerable()
    trainer, _ = start(config, experiment, train_table)
    try:
        trainer.head.load_state_dict(folder.load_weights(config.run.dir))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{config.run.dir / folder.WEIGHTS} does not fit a {card.model} head ({reason})") from None
    return _test(config, experiment, trainer, train_table)


def model_card(config: Config, experiment: Experiment, trainer: Trainer, best: Mapping[str, Any], command: str) -> Card:
    """The card of a trained head."""
    marks = (experiment.fingerprint, experiment.text_fingerprint)
    return Card(
        model=config.head.name,
        config=folder.plain(config),
        fingerprint=None if marks[0] is None else dict(marks[0].fields),
        text_fingerprint=None if marks[1] is None else dict(marks[1].fields),
        answers=experiment.dataset.answers,
        seed=config.train.seed,
        best_epoch=best["epoch"],
        val={name: best[name] for name in ("open", "binary", "all")},
        versions=folder.versions(),
        command=command,
        parameters=sum(p.numel() for p in trainer.head.parameters()),
    )


def _test(config: Config, experiment: Experiment, trainer: Trainer, train_table: QuestionTable) -> Metrics:
    """Metrics, predictions and selections on *test*, written to the run's folder; `test.json` comes last."""
    out, table = config.run.dir, _seen(experiment, "test")
    started = time.monotonic()
    said = trainer.answer(experiment.features, table)
    seconds = time.monotonic() - started
    answers = _texts(experiment, "test", said, train_table)
    metrics = score(experiment.dataset.questions["test"], answers, config.data.split)
    lines = [json.dumps({"question_id": name, "answer": answer}) + "\n" for name, answer in answers.items()]
    folder.write_whole(out / folder.PREDICTIONS, "".join(lines))
    if said.kept is not None:
        content = io.BytesIO()
        np.savez_compressed(content, question_ids=np.array([q.question_id for q in table.questions]), kept=said.kept)
        folder.write_whole(out / folder.SELECTION, content.getvalue())
    unseen = len(experiment.tables["test"]) - len(table)
    if unseen:
        print(f"{unseen} test questions are about quarantined clips; they got the majority answer, unseen", flush=True)
    result = {
        "model": config.head.name,
        "split": config.data.split,
        "seed": config.train.seed,
        **metrics.as_json(),
        "unseen": unseen,
        "seconds": round(seconds, 3),
    }
    folder.write_whole(out / folder.TEST, json.dumps(result, indent=2) + "\n")
    return metrics


def _seen(experiment: Experiment, part: str) -> QuestionTable:
    return experiment.tables[part].encoded(experiment.features.unseen)


def _metrics(experiment: Experiment, part: str, said: Answers, train_table: QuestionTable) -> Metrics:
    answers = _texts(experiment, part, said, train_table)
    return score(experiment.tables[part].questions, answers, experiment.dataset.split)


def _texts(experiment: Experiment, part: str, said: Answers, train_table: QuestionTable) -> dict[str, str]:
    """Answers as text for every question of `part`; where the clip is quarantined, the majority's."""
    vocabulary = experiment.dataset.answers
    seen = {q.question_id: vocabulary[c] for q, c in zip(_seen(experiment, part).questions, said.classes.tolist())}
    fallback = {}
    for index, form in enumerate(FORMS):
        classes = train_table.answer[train_table.form == index]
        classes = classes if len(classes) else train_table.answer
        fallback[form] = vocabulary[int(torch.bincount(classes[classes != NO_CLASS]).argmax())]
    questions = experiment.tables[part].questions
    return {q.question_id: seen.get(q.question_id, fallback[q.form]) for q in questions}


def _digests(experiment: Experiment) -> list[str]:
    marks = (experiment.fingerprint, experiment.text_fingerprint)
    return ["" if mark is None else mark.digest for mark in marks]


def _resume(config: Config, trainer: Trainer, saved: dict[str, Any], digests: list[str]) -> dict[str, Any]:
    if saved["digests"] != digests:
        raise RunError(
            f"{config.run.dir} was training on other features than {config.store.path} now holds; "
            "expected the same store: delete the folder to train from the start"
        )
    trainer.load_state(saved)
    print(f"{config.run.dir}: going on after step {trainer.step} of {trainer.steps}", flush=True)
    return {name: saved[name] for name in ("epoch", "batch", "best", "digests")}


def _best(state: Mapping[str, Any]) -> str:
    best = state["best"]
    return "no val yet" if best is None else f"best val all {best['all']:.2f} (epoch {best['epoch']})"


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
