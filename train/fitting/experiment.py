"""What every command of stage two opens first: the annotations, the stores and the question tables."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from egopatch.configs.schema import Config
from egopatch.extract.datasets import PARTS, Dataset, load_dataset
from egopatch.extract.fingerprints import configured
from egopatch.features import Fingerprint, FingerprintMismatch, Store, StoreError, open_store
from egopatch.features.store.text_substore import TEXT_FOLDER, require_same_network
from egopatch.features.values.location import parse_location
from egopatch.train.data.features import Features
from egopatch.train.data.question_table import QuestionTable
from egopatch.train.heads import BLIND, Sizes
from egopatch.train.processes.distributed import ALONE, Distributed
from egopatch.train.rundir.card import Card, RunError


@dataclass(frozen=True)
class Experiment:
    """One config's data, ready to train on.

    Attributes:
        dataset: annotations.
        features: of all clips and texts of the configured split.
        tables: questions by part.
        train_table: the training questions that can be learned from: clip encoded, answer in the vocabulary.
        sizes: what a head must fit.
        fingerprint: of the clips' store; None where it is not read.
        text_fingerprint: of the texts' store; None where it is not read.
        device: where heads run.
        ranks: processes that work on it together.
    """

    dataset: Dataset
    features: Features
    tables: Mapping[str, QuestionTable]
    train_table: QuestionTable
    sizes: Sizes
    fingerprint: Fingerprint | None
    text_fingerprint: Fingerprint | None
    device: torch.device
    ranks: Distributed

    def encoded(self, part: str) -> QuestionTable:
        """The questions of `part` whose clip was encoded."""
        return self.tables[part].without_clips(self.features.quarantined)


def open_experiment(config: Config, card: Card | None = None, ranks: Distributed = ALONE) -> Experiment:
    """Open what `config` names; with a `card`, only if it is what the card's head was trained on.

    Raises:
        DatasetError: annotations are missing or malformed.
        StoreError: a store is missing, damaged, unfinished, or (FingerprintMismatch, naming the differing fields) made
            by something else than the config's or the card's.
        RunError: the card's answers are not this dataset's, or a part has no questions.
    """
    device = pick_device(config.train.device, ranks)
    dataset = load_dataset(config.data)
    if card is not None and card.answers != dataset.answers:
        raise RunError(
            f"the head in {config.run.dir} knows {len(card.answers)} answers, {config.data.root} has "
            f"{len(dataset.answers)} ({_first_difference(card.answers, dataset.answers)}); expected the same vocabulary"
        )
    name = config.head.name
    expect_clips, expect_texts = (None, None) if card is None else (card.fingerprint, card.text_fingerprint)
    text_store = None if name == "majority" else _open(config, "text", expect_texts)
    store = None if name in BLIND else _open(config, "patches", expect_clips)
    if store is not None and text_store is not None:
        require_same_network(store, text_store)
    questions = [question for part in PARTS for question in dataset.questions[part]]
    features = Features(
        store,
        text_store,
        clip_ids=list(dict.fromkeys(question.clip_id for question in questions)),
        texts=list(dict.fromkeys(question.text for question in questions)),
        residency=config.train.residency,
        device=device,
        ranks=ranks,
    )
    tables: dict[str, QuestionTable] = {
        part: QuestionTable.from_questions(dataset.questions[part], dataset, features.text_rows) for part in PARTS
    }
    train_table = tables["train"].without_clips(features.quarantined).answerable()
    counts = {"train": len(train_table), "val": len(tables["val"]), "test": len(tables["test"])}
    if not all(counts.values()):
        found = ", ".join(f"{count} {part}" for part, count in counts.items())
        raise RunError(f"{config.data.root} has {found} questions; expected some of each: check data.root, data.split")
    return Experiment(
        dataset=dataset,
        features=features,
        tables=tables,
        train_table=train_table,
        sizes=_sizes(store, text_store, len(dataset.answers)),
        fingerprint=None if store is None else store.fingerprint,
        text_fingerprint=None if text_store is None else text_store.fingerprint,
        device=device,
        ranks=ranks,
    )


def pick_device(name: str, ranks: Distributed = ALONE) -> torch.device:
    """The device a config means; of many ranks each has its own.

    Raises:
        RunError: it is not one, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RunError(f"train.device is {name!r}; expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunError(f"train.device is {name!r} but this machine has no usable CUDA device; use cpu or auto")
    if device.type == "cuda" and ranks.size > 1:
        return torch.device("cuda", ranks.local)
    return device


def _open(config: Config, kind: str, expect: Mapping[str, object] | None) -> Store:
    path = parse_location(config.store.path) / ("" if kind == "patches" else TEXT_FOLDER)
    wanted = None if expect is None else Fingerprint(dict(expect))  # type: ignore[arg-type]
    store = open_store(path, wanted)
    if store.spec.kind != kind:
        raise StoreError(f"{path} is a store of {store.spec.kind}; expected one of {kind}: check store.path")
    if kind == "patches":
        _check_config(config, store)
    return store


def _check_config(config: Config, store: Store) -> None:
    # A store outlives the config that made it: training on it by a config that says otherwise would mislabel the run.
    made = store.fingerprint.fields
    differing = [
        f"{name}: {made[name]!r} in the store, {value!r} in the config"
        for name, value in configured(config).items()
        if name in made and made[name] != value
    ]
    if differing:
        raise FingerprintMismatch(
            f"store {store.path} was made by another config ({'; '.join(differing)}); choose its config or another "
            "store.path"
        )


def _sizes(store: Store | None, text_store: Store | None, answers: int) -> Sizes:
    frames, grid, patches, width, text_width = 1, (1, 1), 1, 1, 1
    if store is not None:
        frames, patches, width = store.spec.array("patches").shape
        assert store.spec.grid is not None
        grid = store.spec.grid
    if text_store is not None:
        text_width = text_store.spec.array("states").shape[-1]
    return Sizes(frames, grid, patches, width, text_width, answers)


def _first_difference(here: tuple[str, ...], there: tuple[str, ...]) -> str:
    for index, (one, other) in enumerate(zip(here, there)):
        if one != other:
            return f"class {index} is {one!r} here, {other!r} there"
    return "the longer one goes on where the other ends"
