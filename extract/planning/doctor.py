"""Checks of the data set and the machine: what is present, and what looks wrong.

A fault must be fixed before features are encoded or results are trusted; a note is a property of the data that the
protocol handles. Only faults make the command exit with 1.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from egopatch.configs.schema import Config, ConfigError, DataConfig
from egopatch.extract.datasets import PARTS, Clip, Dataset, DatasetError, Question, egotaskqa, load_dataset
from egopatch.extract.datasets.folder import missing_hint, names_in
from egopatch.extract.datasets.origins import REFRESH, compare_origins
from egopatch.extract.datasets.records import UNKNOWN_ANSWERS
from egopatch.extract.encoders import find_network, load_tokenizer
from egopatch.extract.encoders.checkpoints.package import MINILM, MINILM_REMEDY
from egopatch.extract.errors import CheckpointError, JobFailed
from egopatch.extract.texts import cut_texts, find_text_network
from egopatch.extract.worker.device import arithmetic_advice, device_of
from egopatch.extract.worker.job import ExtractionJob, resolve_job
from egopatch.features import StoreError
from egopatch.features.common.command_line import pick_varied
from egopatch.features.common.units import counted
from egopatch.features.state.counts import read_ledger
from egopatch.features.state.origin import Origin

VERIFY_ANSWERS = ("yes", "no")
SHOWN = 5
UNRECORDED = (
    "clips that cannot be compared, because they were imported or an earlier version stored them, without stretch "
    "and video file"
)


@dataclass(frozen=True)
class Finding:
    """A fault or a note.

    Attributes:
        what: Description of the items.
        severity: `fault` or `note`.
        count: Number of items.
        found: The items, one line each.
    """

    what: str
    severity: Literal["fault", "note"]
    count: int
    found: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Counts of the data set, faults and notes, and advice for jobs on this machine."""

    counts: Mapping[str, int]
    findings: tuple[Finding, ...]
    advice: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether there is no fault."""
        return not any(finding.severity == "fault" for finding in self.findings)


def examine(config: Config) -> Diagnosis:
    """Read the annotations of every split that is present, and check videos, store, networks and machine.

    A missing checkpoint is not a fault: `extract data` may download it. Annotations that cannot be read are a fault,
    with one item per line or record; then the rest of the data set is not checked.

    Raises:
        DatasetError: The folder `data.root` does not exist.
    """
    arithmetic = arithmetic_advice(config, device_of(config.encoder.device))
    job, faults = _job(config)
    frames = None if job is None else job.frames_line
    advice = tuple(line for line in (arithmetic, frames) if line is not None)
    networks = [_fault("checkpoint that cannot be used", faults)]
    try:
        splits = _load_splits(config.data)
    except DatasetError as error:
        if not config.data.root.is_dir():
            raise
        annotations = _fault("annotations that are missing or cannot be used", error.problems)
        return Diagnosis({}, (annotations, *_present(networks)), advice)
    dataset = splits[config.data.split]
    is_file = functools.cache(Path.is_file)  # many clips share a video
    if dataset.texts:  # without questions, no text network is loaded
        networks += _text_findings(config, dataset.texts, job)
    findings = [*networks, *_clip_findings(config, dataset, is_file), *_across_splits(splits)]
    for split, other in splits.items():
        findings += _question_findings(f"{split}: " if len(splits) > 1 else "", other)
    return Diagnosis(_counts(splits, dataset, is_file), _present(findings), advice)


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """The diagnosis as a few lines of text."""
    lines = []
    for name, count in diagnosis.counts.items():
        if not name.endswith("answers"):
            lines.append(f"{name:<26} {count}")
        elif count > len(UNKNOWN_ANSWERS):  # there are no others without questions, or if the questions have options
            lines.append(f"{name:<26} {count}, unknown ones included")
    for finding in diagnosis.findings:
        rest = len(finding.found) - SHOWN
        lines.append(f"{counted(finding.count, finding.severity)}: {finding.what}")
        lines += [f"    {item}" for item in pick_varied(finding.found, SHOWN)] + (
            [f"    and {rest} more; --json lists all of them"] if rest > 0 else []
        )
    lines += ["no faults found"] if diagnosis.sound else []
    return "\n".join([*lines, *(f"advice: {line}" for line in diagnosis.advice)])


def _load_splits(data: DataConfig) -> dict[str, Dataset]:
    """The configured split first, then EgoTaskQA's other split if all of its parts are present."""
    splits: dict[str, Dataset] = {data.split: load_dataset(data)}
    for split in egotaskqa.SPLITS if data.name == "egotaskqa" else ():
        if split not in splits and all(egotaskqa.annotation_file(data.root, split, part) for part in PARTS):
            splits[split] = load_dataset(dataclasses.replace(data, split=split))  # type: ignore[arg-type]
    return splits


def _counts(splits: Mapping[str, Dataset], dataset: Dataset, is_file: Callable[[Path], bool]) -> dict[str, int]:
    counts = {
        "clips": len(dataset.clips),
        "clips with a video": sum(is_file(clip.video) for clip in dataset.clips),
        "question texts": len(dataset.texts),
    }
    for split, other in splits.items():
        name = f"{split} " if len(splits) > 1 else ""
        counts[f"{name}answers"] = len(other.answers)
        for part, questions in other.questions.items():
            counts[f"{name}{part} questions"] = len(questions)
            forms = Counter(question.form for question in questions)
            counts |= {f"{name}{part} {form}": forms[form] for form in ("open", "binary")}
    return counts


def _clip_findings(config: Config, dataset: Dataset, is_file: Callable[[Path], bool]) -> Iterator[Finding]:
    data, origins, unreadable = config.data, dict[str, Origin | None](), []
    try:
        origins = read_ledger(config.store.path).origins()
    except (StoreError, OSError) as error:
        unreadable.append(str(error))
    check = compare_origins(dataset.clips, data.root, origins)
    yield _fault("store that cannot be read", unreadable)
    yield _fault(
        f"stale clips, whose rows in the store no longer match the annotations; `{REFRESH}` encodes them again",
        [f"{clip_id}: {difference}" for clip_id, difference in check.stale.items()],
    )
    yield Finding(UNRECORDED, "note", check.unrecorded, ())
    present = [clip for clip in dataset.clips if is_file(clip.video)]
    beside = functools.cache(names_in)  # many videos share a folder
    absent = {
        clip.clip_id: f"{_at(clip)} {missing_hint(clip.video, beside(clip.video.parent)) or ''}".rstrip()
        for clip in dataset.clips
        if not is_file(clip.video)
    }
    is_empty = functools.cache(lambda video: not video.stat().st_size)
    stored = origins.keys() - check.stale.keys()
    yield _fault("clips without a video file", [line for clip_id, line in absent.items() if clip_id not in stored])
    yield _note(
        "stored clips whose video file is gone", [line for clip_id, line in absent.items() if clip_id in stored]
    )
    yield _fault("clips with an empty video file", [_at(clip) for clip in present if is_empty(clip.video)])
    with_question = {question.clip_id for questions in dataset.questions.values() for question in questions}
    without = [clip.clip_id for clip in dataset.clips if clip.clip_id not in with_question]
    # Only EgoTaskQA's splits have questions of their own.
    yield _note(f"clips without a {f'{data.split} ' if data.name == 'egotaskqa' else ''}question", without)
    if data.name == "egotaskqa":
        used = {clip.video for clip in dataset.clips}
        folder = data.root / egotaskqa.VIDEO_FOLDER
        yield _note("video files without a question", sorted(str(p) for p in folder.glob("*") if p not in used))
        yield from _annotation_file_findings(data)


def _annotation_file_findings(data: DataConfig) -> Iterator[Finding]:
    """EgoTaskQA's annotation files: parts of one split in two folders, and missing parts of the other split."""
    mixed, absent = [], []
    for split in egotaskqa.SPLITS:
        files = {part: egotaskqa.annotation_file(data.root, split, part) for part in PARTS}
        folders = sorted({str(file.parent) for file in files.values() if file is not None})
        if len(folders) > 1:
            mixed.append(f"{split}: {', '.join(folders)}")
        if folders:
            absent += [f"{split} {part}" for part, file in files.items() if file is None]
    yield _fault("splits whose parts come from different folders", mixed)
    yield _note("missing parts of a split that is not configured", absent)


def _question_findings(split: str, dataset: Dataset) -> Iterator[Finding]:
    """Faults and notes within one split."""
    everything = [(part, question) for part, questions in dataset.questions.items() for question in questions]
    yield _note(
        f"{split}parts without a question; training needs all three parts, `train evaluate --from` only test",
        [part for part in PARTS if not dataset.questions[part]],
    )
    part_of: dict[str, str] = {}
    trained = {(question.clip_id, question.text.lower()) for question in dataset.questions["train"]}
    doubled, leaked = [], []
    for part, question in everything:
        if question.question_id in part_of:
            doubled.append(f"{question.question_id}: {part_of[question.question_id]} and {part}")
        part_of[question.question_id] = part
        if part != "train" and (question.clip_id, question.text.lower()) in trained:
            leaked.append(f"{_named(part, question)}: {question.clip_id}: {question.text}")
    yield _fault(f"{split}question ids in more than one part", doubled)
    yield _fault(f"{split}val and test questions that are also in train, with the same clip", leaked)
    yield _fault(
        f"{split}verify questions whose answer is neither yes nor no",
        [_with_answer(p, q) for p, q in everything if q.form == "binary" and q.answer not in VERIFY_ANSWERS],
    )
    yield _note(
        f"{split}questions with the same option twice",
        [_named(p, q) for p, q in everything if len({o.strip().lower() for o in q.options}) < len(q.options)],
    )
    yield _note(
        f"{split}test questions whose right option is not published; they are not counted",
        [_named(p, q) for p, q in everything if not q.counts],
    )
    answers = set(dataset.answers)
    yield _fault(
        f"{split}questions whose answer_encode is the class of another answer",
        [
            f"{_with_answer(p, q)}, class {q.encoded} is {dataset.answers[q.encoded]!r}"
            for p, q in everything
            if q.encoded is not None and q.encoded > 1 and dataset.answers[q.encoded] != q.answer
        ],
    )
    yield _note(
        f"{split}val and test questions whose answer is not in the answer set, so that no system can answer them",
        [_with_answer(p, q) for p, q in everything if p != "train" and q.answer not in answers and not q.options],
    )
    yield _note(
        f"{split}questions that the released files encode as unknown because of a capital letter; here they count",
        [_with_answer(p, q) for p, q in everything if q.encoded in (0, 1) and q.answer in answers],
    )


def _across_splits(splits: Mapping[str, Dataset]) -> Iterator[Finding]:
    """Question ids that belong to different questions in the two splits."""
    first: dict[str, tuple[str, Question]] = {}
    other = []
    for split, dataset in splits.items():
        for question in (question for questions in dataset.questions.values() for question in questions):
            known, same = first.setdefault(question.question_id, (split, question))
            content = (question.clip_id, question.text, question.answer)
            if known != split and content != (same.clip_id, same.text, same.answer):
                other.append(f"{question.question_id}: {same.text!r} in {known}, {question.text!r} in {split}")
    yield _fault("question ids that belong to different questions in the two splits", other)


def _job(config: Config) -> tuple[ExtractionJob | None, list[str]]:
    """The job with its checkpoint, or the checkpoint's faults; neither if it does not exist."""
    if config.encoder.checkpoint is None or not Path(config.encoder.checkpoint).exists():
        return None, []
    try:
        return resolve_job(config), []
    except (CheckpointError, ConfigError, JobFailed) as error:
        return None, [str(error)]


def _text_findings(config: Config, texts: Sequence[str], job: ExtractionJob | None) -> list[Finding]:
    length, network = config.text.max_length, find_network(config.encoder.arch)
    own_weights = network.text_weights is not None
    try:
        tokenizer = load_tokenizer(config.text.model, length)
    except ConfigError as error:
        remedy = f"; {MINILM_REMEDY}" if own_weights and config.text.model != MINILM.name else ""
        return [_fault("tokenizer that cannot be loaded", [f"{error}{remedy}"])]
    # Weights that `extract data` or the hub may still provide are not a fault.
    packaged_or_local = config.text.model == MINILM.name or Path(config.text.model).exists()
    video = None if job is None else job.checkpoint
    refused = []
    try:
        if packaged_or_local if own_weights else video is not None:
            _ = find_text_network(config, network, torch.device("cpu"), video).spec
    except (CheckpointError, ConfigError, StoreError) as error:
        refused.append(str(error))
    return [
        _fault("text network that cannot be used", refused),
        _note(
            f"question texts of {length} tokens (text.max_length) or more; only the first {length} are read",
            cut_texts(tokenizer, texts),
        ),
    ]


def _present(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding.count)


def _fault(what: str, found: Sequence[str]) -> Finding:
    return Finding(what, "fault", len(found), tuple(found))


def _note(what: str, found: Sequence[str]) -> Finding:
    return Finding(what, "note", len(found), tuple(found))


def _at(clip: Clip) -> str:
    return f"{clip.clip_id}: {clip.video}"


def _named(part: str, question: Question) -> str:
    return f"{question.question_id} in {part}"


def _with_answer(part: str, question: Question) -> str:
    return f"{_named(part, question)}: {question.spelling!r}"
