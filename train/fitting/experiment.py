"""The data of one config, opened once: annotations, stores, question tables, device and ranks."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import PARTS, Dataset, Question, load_dataset
from egopatch.extract.datasets.origins import compare_origins, unrecorded_line
from egopatch.extract.encoders import find_network
from egopatch.extract.fingerprints import configured
from egopatch.features import Fingerprint, FingerprintMismatch, Store, StoreError, open_store
from egopatch.features.common.machine import find_device, limit_threads
from egopatch.features.common.units import counted
from egopatch.features.store.text_substore import TEXT_FOLDER, require_same_network
from egopatch.features.values.location import parse_location
from egopatch.train.data.features import Features, quarantined_clips
from egopatch.train.data.question_table import FORMS, QuestionTable
from egopatch.train.heads import Sizes, reads_video
from egopatch.train.processes.distributed import ALONE, Distributed
from egopatch.train.rundir.card import Card, chooses_options
from egopatch.train.rundir.names import CONFIG
from egopatch.train.rundir.results import WITHOUT_FEATURES
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.rundir.trained_on import DataRecord, clip_versions, record_data, require_same_clips


@dataclass(frozen=True)
class Experiment:
    """The data of one config, ready to train on.

    Attributes:
        dataset: Annotations.
        features: Features of all clips and texts of the configured split.
        tables: Questions by part.
        encoded: Questions whose clips are encoded, by part.
        train_table: Training questions to learn from: clip encoded, answer in the vocabulary.
        sizes: Sizes that a head must fit.
        fingerprint: Fingerprint of the clips' store; None if no head reads it.
        text_fingerprint: Fingerprint of the texts' store; None if no head reads it.
        clip_versions: As `trained_on.clip_versions` of the clips that decide the weights, from before they were read:
            those of *train* are learned, those of *val* choose the epoch. None if no head reads clips.
        unrecorded: Number of clips that cannot be compared with the annotations, as in `OriginCheck`.
        device: Device of the heads.
        ranks: Processes that train together.
    """

    dataset: Dataset
    features: Features
    tables: Mapping[str, QuestionTable]
    encoded: Mapping[str, QuestionTable]
    train_table: QuestionTable
    sizes: Sizes
    fingerprint: Fingerprint | None
    text_fingerprint: Fingerprint | None
    clip_versions: Mapping[str, str] | None
    unrecorded: int
    device: torch.device
    ranks: Distributed

    @property
    def data_lines(self) -> list[str]:
        """Log lines on where the features are kept, what is unknown about them, which questions of *train* and *val*
        are about quarantined clips, and which answers no head can give.
        """
        note = [f"note: {unrecorded_line(self.unrecorded)}"] if self.unrecorded else []
        quarantined = [*self._quarantine_lines("train"), *self._quarantine_lines("val")]
        return [self.features.residency_line, *note, *quarantined, *self._answer_lines()]

    def print_quarantined(self) -> None:
        """Print, on the first rank, how many *test* questions get the majority answer because of quarantined clips."""
        for line in self._quarantine_lines("test"):
            self.ranks.print_once(line)

    def _quarantine_lines(self, part: str) -> Iterator[str]:
        """A line if questions of `part` are about quarantined clips."""
        asked = len(self.tables[part])
        effect = "nothing is learned from them" if part == "train" else "the majority answer stands in"
        if some := asked - len(self.encoded[part]):
            questions = counted(asked, f"{part} question")
            about = counted(some, f"of {questions} is about", f"of {questions} are about")
            yield f"note: {about} quarantined clips; {effect}"

    def _answer_lines(self) -> Iterator[str]:
        """A line for each of *val* and *test* with answers that are not in the vocabulary."""
        if self.dataset.choices:  # a head chooses among the question's own options
            return
        for part in ("val", "test"):
            table = self.tables[part]
            outside = [question.spelling for question in table.without_classes()]
            if outside:
                share = 100 * (1 - len(outside) / len(table))
                yield (
                    f"note: the answers of {len(outside)} of {counted(len(table), f'{part} question')}, such as "
                    f"{outside[0]!r}, are not among the training answers, so no head can give them: accuracy is at "
                    f"most {share:.2f}"
                )

    @cached_property
    def data_record(self) -> DataRecord:
        """The answers and questions that training depends on; those of *test* may change until it ends."""
        encoded = {question.question_id for question in self.encoded["val"].questions}
        left_out = [question for question in self.tables["val"].questions if question.question_id not in encoded]
        questions = {
            "train questions": self.train_table.questions,
            "val questions": self.encoded["val"].questions,
            "val questions about quarantined clips": left_out,
        }
        return record_data(self.dataset.answers, questions)

    def require_trained_on(self, run: Path) -> None:
        """Refuse a run whose training clips were encoded again since, as `require_same_clips` does."""
        store = self.features.store
        if store is not None:
            self.ranks.broadcast(lambda: require_same_clips(run, store))

    def answer_of(self, question: Question, answer: int) -> str:
        """The text of class `answer`: an entry of the vocabulary, or one of the question's options."""
        return question.options[answer] if question.options else self.dataset.answers[answer]

    def fallback_answer(self, question: Question) -> str:
        """The majority answer, which replaces a head's answer if the clip is quarantined.

        It is the most frequent training answer to the question's form, or to all forms if the form has no training
        question. For multiple choice, it is the option at the index that is right most often.
        """
        if question.options:
            return question.options[min(self._majority[question.form], len(question.options) - 1)]
        return self.dataset.answers[self._majority[question.form]]

    @cached_property
    def _majority(self) -> Mapping[str, int]:
        """The most frequent training class by form."""
        table, most = self.train_table, {}
        for index, form in enumerate(FORMS):
            answers = table.answer[table.form == index]
            most[form] = int(torch.bincount(answers if len(answers) else table.answer, minlength=1).argmax())
        return most


def open_experiment(config: Config, card: Card | None = None, ranks: Distributed = ALONE) -> Experiment:
    """Open the data and features of `config`; with a `card`, require those that the card's head was trained on.

    Raises:
        ConfigError: This machine does not have the device, the encoder's name is unknown, or there are no questions.
        DatasetError: Annotations are missing or malformed.
        StoreError: A store is missing, damaged or unfinished, or holds stale clips.
        FingerprintMismatch: A store was created with other settings than the config's or the card's.
        RunError: The card's answers differ from the data set's, or a part has no questions, or all questions
            of *test* are about quarantined clips; or, without a card, no question of *val* has a published answer.
    """
    limit_threads(ranks.local_size)
    device = pick_device(config.train.device, ranks)
    if config.train.deterministic:
        # cuBLAS reads this once, before its first product; without it torch refuses all products on a GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dataset = _load_annotations(config)
    if card is not None:
        _require_vocabulary(config, card, dataset)
    store, text_store = _open_stores(config, card)
    questions = [question for part in PARTS for question in dataset.questions[part]]
    clip_ids = list(dict.fromkeys(question.clip_id for question in questions))
    unrecorded = 0 if store is None else ranks.broadcast(partial(_refuse_stale, store, dataset, config, clip_ids))
    quarantined = frozenset() if store is None else quarantined_clips(store, clip_ids)
    text_rows = _text_rows(questions)
    tables: dict[str, QuestionTable] = {
        part: QuestionTable.from_questions(
            dataset.questions[part], dataset, text_rows, config.data.paraphrases and part == "train"
        )
        for part in PARTS
    }
    encoded = {part: table.without_clips(quarantined) for part, table in tables.items()}
    train_table = encoded["train"].answerable()
    # Before the features are read, which may take minutes.
    _require_questions(config.data.root, tables, encoded, train_table, is_trained=card is not None)
    # A row that is replaced while the features are read must not pass for the one that was read.
    deciding = list(dict.fromkeys([*train_table.clips, *encoded["val"].clips]))
    versions = None if store is None else clip_versions(store, deciding)
    features = Features(
        store,
        text_store,
        clip_ids=[name for name in clip_ids if name not in quarantined],
        texts=list(text_rows),
        residency=config.train.residency,
        device=device,
        ranks=ranks,
    )
    return Experiment(
        dataset=dataset,
        features=features,
        tables=tables,
        encoded=encoded,
        train_table=train_table,
        sizes=sizes_of(store, text_store, len(dataset.answers), dataset.choices),
        fingerprint=None if store is None else store.fingerprint,
        text_fingerprint=None if text_store is None else text_store.fingerprint,
        clip_versions=versions,
        unrecorded=unrecorded,
        device=device,
        ranks=ranks,
    )


def _load_annotations(config: Config) -> Dataset:
    """The data set of `config`, which must have questions."""
    dataset = load_dataset(config.data)
    if any(dataset.questions.values()):
        return dataset
    if config.data.name != "jsonl":
        raise ConfigError(
            f"the data set {config.data.name} has clips but no questions; expected questions of each part"
        )
    raise ConfigError(
        f"data.questions is {config.data.questions!r}, so {config.data.root} has clips but no questions; set"
        " data.questions to a file of questions in that folder, and run `extract run` with the same config"
    )


def _open_stores(config: Config, card: Card | None) -> tuple[Store | None, Store | None]:
    """The stores of clips and of texts that the head reads; None for a store that it does not read."""
    store = text_store = None
    if reads_video(config.head.name):
        store = open_features(config, "patches", None if card is None else card.fingerprint)
    if config.head.name not in WITHOUT_FEATURES:
        text_store = open_features(config, "text", None if card is None else card.text_fingerprint)
    if store is not None and text_store is not None:
        require_same_network(store, text_store)
    return store, text_store


def _text_rows(questions: Sequence[Question]) -> dict[str, int]:
    """The row of each text: of the questions, their options and their variants."""
    texts = [
        *(question.text for question in questions),
        *(option for question in questions for option in question.options),
        *(text for question in questions for text in question.variants or ()),
    ]
    return {text: row for row, text in enumerate(dict.fromkeys(texts))}


def _require_vocabulary(config: Config, card: Card, dataset: Dataset) -> None:
    chooses = chooses_options(card.answers)
    has_options = any(question.options for part in PARTS for question in dataset.questions[part])
    if chooses != has_options:
        way, kind = "chooses among options" if chooses else "has an answer vocabulary", "" if has_options else "no "
        raise RunError(
            f"the head in {config.run.dir} {way} but the questions in {config.data.root} have {kind}options; expected "
            "questions of the kind that it was trained on"
        )
    if card.answers != dataset.answers:
        raise RunError(
            f"the head in {config.run.dir} was trained on {counted(len(card.answers), 'answer')} but "
            f"{config.data.root} has {len(dataset.answers)} ({_first_difference(card.answers, dataset.answers)}); "
            "expected the same vocabulary: check data.root"
        )


def _require_questions(
    root: Path,
    tables: Mapping[str, QuestionTable],
    encoded: Mapping[str, QuestionTable],
    train_table: QuestionTable,
    is_trained: bool,
) -> None:
    """Refuse data below `root` without questions to test on or, unless the head `is_trained`, to learn from."""
    for part in ("test",) if is_trained else ("test", "train"):
        if len(tables[part]) and not len(encoded[part]):
            raise RunError(
                f"{root} has {counted(len(tables[part]), f'{part} question')}, all about quarantined clips, so none "
                "can be used; repair the videos (`egopatch extract status --config CONFIG` names a reason), then run "
                "`egopatch extract retry --config CONFIG`"
            )
    if not is_trained and len(encoded["train"]) and not len(train_table):
        raise RunError(
            f"{root} has {counted(len(encoded['train']), 'train question')}, but none has an answer that is published "
            "and in the answer vocabulary, so a head can learn nothing; correct the answers or the vocabulary"
        )
    counts = {part: len(table) for part, table in tables.items()}
    if not (counts["test"] if is_trained else all(counts.values())):
        found = ", ".join(f"{count} {part}" for part, count in counts.items())
        raise RunError(f"{root} has {found} questions; expected some of each: check data.root, data.split")
    if not is_trained and not any(question.counts for question in tables["val"].questions):
        raise RunError(
            f"{root} has {counted(counts['val'], 'val question')}, but none has a published answer, so they cannot "
            "choose an epoch; use a part with published answers as val, or evaluate a head that was trained on another "
            "data set: egopatch train evaluate --config CONFIG --from RUN"
        )


def pick_device(name: str, ranks: Distributed = ALONE) -> torch.device:
    """The device that `train.device` means; with several ranks, each has its own.

    Raises:
        ConfigError: `name` is not a device, or this machine does not have it.
    """
    try:
        device = find_device(name)
    except ValueError as error:
        raise ConfigError(f"train.device is {name!r}; {error}") from None
    if device.type == "cuda" and ranks.size > 1:
        return torch.device("cuda", ranks.local)
    return device


@contextmanager
def caller_state_kept(device: str) -> Iterator[None]:
    """Restore torch's random generators and its number of threads after the block.

    Each step seeds torch's own generator for heads from outside, and opening an experiment limits the threads.

    Args:
        device: `train.device`.
    """
    threads = torch.get_num_threads()
    # Seeding torch seeds every GPU. Saving the GPUs' states starts CUDA, which a run on the CPU must not do.
    cuda = torch.cuda.is_initialized() or pick_device(device).type == "cuda"
    with torch.random.fork_rng(range(torch.cuda.device_count()) if cuda else ()):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def open_features(config: Config, kind: str, expect: Mapping[str, Any] | None) -> Store:
    """The config's store of `patches`, or its text substore (`kind` `text`).

    Raises:
        ConfigError: The encoder's name is unknown.
        FingerprintMismatch: The store was created with other settings than the config's, or its fingerprint is not
            `expect`, that of the features a head was trained on.
        StoreError: The store is missing, damaged or of another kind.
    """
    path = parse_location(config.store.path) / ("" if kind == "patches" else TEXT_FOLDER)
    store = open_store(path)
    trained_on = None if expect is None else Fingerprint(expect)
    if trained_on is not None and (different := store.fingerprint.differences(trained_on, "store has", "head has")):
        names = ", ".join(line.partition(":")[0] for line in different)
        raise FingerprintMismatch(
            f"the head in {config.run.dir} was trained on features that differ from store {path} (different: "
            f"{names}); use the run.dir and store.path of one config, such as {config.run.dir / CONFIG}"
        )
    if store.spec.kind != kind:
        raise StoreError(f"store {path} holds {store.spec.kind}; expected {kind}: check store.path")
    if kind == "patches":
        _check_config(config, store)
    return store


def _check_config(config: Config, store: Store) -> None:
    # A store outlives the config that created it: training on it with other settings would mislabel the run.
    created = store.fingerprint.fields
    if config.encoder.arch != created.get("arch"):
        find_network(config.encoder.arch)  # refuses a misspelled name, and suggests the nearest one
    differences = [
        f"{name}: store has {created[name]!r}, requested {value!r}"
        for name, value in configured(config).items()
        if name in created and created[name] != value
    ]
    if differences:
        raise FingerprintMismatch(
            f"store {store.path} was created with different settings ({'; '.join(differences)}); use another "
            "store.path or the original settings"
        )


def _refuse_stale(store: Store, dataset: Dataset, config: Config, clip_ids: Collection[str]) -> int:
    """Refuse rows that do not match the annotations of their clips; returns the number that cannot be compared.

    Clips outside `clip_ids` may be stale.
    """
    requested = set(clip_ids)
    clips = (clip for clip in dataset.clips if clip.clip_id in requested)
    check = compare_origins(clips, config.data.root, store.origins())
    if check.stale:
        raise StoreError(f"store {store.path}: {check.stale_line()}")
    return 0 if store.fingerprint.fields.get("origin") == "imported" else check.unrecorded


def sizes_of(store: Store | None, text_store: Store | None, answers: int, choices: int) -> Sizes:
    """The sizes that a head on these stores must fit; `answers` and `choices` as in `Sizes`."""
    frames, patches, width = (1, 1, 1) if store is None else store.spec.array("patches").shape
    grid = (1, 1) if store is None else store.spec.grid
    assert grid is not None
    text_width = 1 if text_store is None else text_store.spec.array("states").shape[-1]
    return Sizes(frames, grid, patches, width, text_width, answers, choices)


def _first_difference(head: tuple[str, ...], data: tuple[str, ...]) -> str:
    for index, pair in enumerate(zip(head, data)):
        if pair[0] != pair[1]:
            return f"class {index}: head has {pair[0]!r}, data set has {pair[1]!r}"
    return "the shorter list is the beginning of the longer one"
