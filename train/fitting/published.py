"""A published network as its authors fine-tuned it, evaluated through the two stages without any training."""

from dataclasses import replace

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.encoders.inspection import inspect_checkpoint
from egopatch.extract.errors import CheckpointError
from egopatch.features import FingerprintMismatch
from egopatch.train.fitting.answers import answer_table, score_part
from egopatch.train.fitting.experiment import Experiment, open_experiment
from egopatch.train.fitting.run import Member
from egopatch.train.fitting.run_group import build_stack
from egopatch.train.processes.distributed import ALONE, Distributed
from egopatch.train.rundir import card as folder
from egopatch.train.rundir.card import Card
from egopatch.train.scores.metrics import Metrics

SYSTEMS = ("egovlpv2", "mfas")


def evaluate_published(config: Config, command: str, ranks: Distributed = ALONE) -> Metrics:
    """Evaluate `head.checkpoint` on *val* and *test*; what the file holds and lacks is printed first.

    Its lower half has made the store, its upper half is the head, its classifier's classes are the answer set's.

    Args:
        config: the experiment; `encoder.checkpoint` of the store is the same file.
        command: that was given, for the model card.
        ranks: processes that answer together.

    Raises:
        ConfigError: a head without a published classifier, or a folder that holds another run.
        CheckpointError: the file is unreadable, another network's, incomplete, or has another number of answers.
        FingerprintMismatch: other weights made the store.
        StoreError, DatasetError: features or annotations are missing or damaged.
    """
    path, name = config.head.checkpoint, config.head.name
    assert path is not None
    if name not in SYSTEMS:
        raise ConfigError(
            f"head.checkpoint is {path} but head.name is {name}, of which no classifier for EgoTaskQA was published; "
            f"expected head.name {' or '.join(SYSTEMS)}"
        )
    found = inspect_checkpoint(path)
    for line in found.lines():
        ranks.print_once(line)
    found.require_complete()
    experiment = open_experiment(config, ranks=ranks)
    answers = len(experiment.dataset.answers)
    if found.answers != answers:
        has = "no classifier (pretraining)" if found.answers is None else f"a classifier of {found.answers} answers"
        raise CheckpointError(
            f"{path}: it has {has}, {config.data.root} has {answers} answers; expected the answer set that it was "
            "fine-tuned on, or a file fine-tuned on this one"
        )
    _check_store(config, experiment, found.sha256)
    ranks.broadcast(lambda: folder.claim(config.run.dir, config))
    stack = build_stack([replace(config, train=replace(config.train, ema=0.0))], experiment, order=0)
    member, size = Member(config, experiment), config.train.batch
    ((of_val,),) = answer_table([stack], experiment.features, experiment.encoded("val"), size)
    ((of_test,),) = answer_table([stack], experiment.features, experiment.encoded("test"), size)
    val = score_part(experiment, "val", of_val)[0]
    # Epoch 0: nothing was trained here and nothing was chosen.
    member.best = {"epoch": 0, **{part: getattr(val, part).accuracy for part in ("open", "binary", "all")}}
    member.write_card(command, sum(tensor.numel() for tensor in stack.weights(0).values()))
    return member.end(of_test)


def has_run(config: Config) -> bool:
    """Whether the run's folder holds a trained head, or the card of anything else than an untrained evaluation."""
    card = config.run.dir / folder.CARD
    return (config.run.dir / folder.WEIGHTS).exists() or (card.exists() and Card.read(config.run.dir).best_epoch > 0)


def _check_store(config: Config, experiment: Experiment, sha256: str) -> None:
    assert experiment.fingerprint is not None
    made_by = experiment.fingerprint.fields.get("checkpoint")
    if made_by != sha256:
        raise FingerprintMismatch(
            f"store {config.store.path} was made by a checkpoint of sha256 {made_by}, head.checkpoint "
            f"{config.head.checkpoint} has {sha256}; encode with it first: python -m extract run --config CONFIG "
            f"--encoder.checkpoint {config.head.checkpoint} --store.path ANOTHER"
        )
