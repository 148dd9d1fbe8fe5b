"""Evaluates a published network as its authors fine-tuned it, through both stages and without any training."""

import shlex
from dataclasses import replace

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.encoders.inspection import inspect_checkpoint
from egopatch.extract.errors import CheckpointError
from egopatch.features import FingerprintMismatch
from egopatch.features.common.units import counted
from egopatch.train.fitting.answers import answer_part, score_part
from egopatch.train.fitting.experiment import Experiment, open_experiment
from egopatch.train.fitting.run import write_card, write_test_results
from egopatch.train.fitting.shortage import shortage_explained
from egopatch.train.heads import build_head
from egopatch.train.processes.distributed import Distributed
from egopatch.train.rundir import run_folder
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.lease import hold_when_free
from egopatch.train.rundir.names import CARD, WEIGHTS
from egopatch.train.scores.metrics import Metrics
from egopatch.train.steps.stacked_heads import StackedHeads

SYSTEMS = ("egovlpv2", "mfas")


def evaluate_published(config: Config, command: str, ranks: Distributed) -> Metrics:
    """Print a report on the tensors in `head.checkpoint`, then evaluate it on *val* and *test*.

    The lower half of the network created the store, its upper half is the head, and the classes of its classifier are
    those of the answer set.

    Args:
        config: The experiment; `encoder.checkpoint` of the store is the same file.
        command: Command line, for the model card.
        ranks: Processes that answer together.

    Raises:
        ConfigError: The head has no published classifier, or the folder holds another run.
        RunError: Training began in the folder.
        CheckpointError: The file is unreadable, another network's, incomplete, or has another number of answers.
        FingerprintMismatch: The store was created with other weights.
        StoreError, DatasetError: Features or annotations are missing or damaged.
    """
    path, name = config.head.checkpoint, config.head.name
    assert path is not None
    if name not in SYSTEMS:
        raise ConfigError(
            f"head.checkpoint is {path} but head.name is {name}, for which no EgoTaskQA classifier was published; "
            f"expected head.name {' or '.join(SYSTEMS)}"
        )
    inspection = inspect_checkpoint(path)
    for line in inspection.lines():
        ranks.print_once(line)
    inspection.require_complete()
    experiment = open_experiment(config, ranks=ranks)
    answers = len(experiment.dataset.answers)
    if inspection.answers != answers:
        count = inspection.answers
        has = "no classifier (pretraining)" if count is None else f"a classifier of {counted(count, 'answer')}"
        raise CheckpointError(
            f"{path} has {has} but {config.data.root} has {counted(answers, 'answer')}; expected a "
            "file that was fine-tuned on this answer set"
        )
    _check_store(config, experiment, inspection.sha256)
    folder = config.run.dir
    with (
        hold_when_free(folder, ranks, lambda: run_folder.require_untrained(folder)),
        shortage_explained(config.train, folder),
    ):
        head = build_head(config, experiment.sizes).to(experiment.device)
        ranks.broadcast(lambda: run_folder.claim(folder, config))
        train = replace(config.train, ema=0.0)
        heads = StackedHeads([head], [train.seed], train, 0, experiment.device)
        ((val_answers,),) = answer_part(experiment, "val", [heads])
        ((test_answers,),) = answer_part(experiment, "test", [heads])
        val = score_part(experiment, "val", val_answers)[0]
        # Epoch 0: nothing was trained and no epoch was chosen.
        best = {"epoch": 0, **{name: score.accuracy for name, score in val.headline_rows()}}
        write_card(config, experiment, best, heads.weights(0), command)
        metrics = write_test_results(config, experiment, test_answers)
        experiment.print_quarantined()
        return metrics


def has_run(config: Config) -> bool:
    """Whether the run's folder holds a trained head, or the card of a training."""
    card = config.run.dir / CARD
    trained = (config.run.dir / WEIGHTS).exists()
    return trained or (card.exists() and Card.read(config.run.dir).best_epoch > 0)


def _check_store(config: Config, experiment: Experiment, sha256: str) -> None:
    assert experiment.fingerprint is not None
    encoded_with = experiment.fingerprint.fields.get("checkpoint")
    if encoded_with != sha256:
        raise FingerprintMismatch(
            f"store {config.store.path} was created with a checkpoint of SHA-256 {encoded_with} but head.checkpoint "
            f"{config.head.checkpoint} has {sha256}; encode with head.checkpoint first: egopatch extract run "
            f"--config CONFIG --encoder.checkpoint {shlex.quote(str(config.head.checkpoint))} --store.path ANOTHER"
        )
