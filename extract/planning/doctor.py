"""A look at the data set and the machine: what is there, how many, and what is odd about it.

A fault is something to mend before features are made or figures are believed; a note is a property of the data that the
protocol deals with. Only faults make the command exit with 1.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from egopatch.configs.schema import Config, DataConfig
from egopatch.extract.datasets import PARTS, Clip, Dataset, DatasetError, Question, egotaskqa, load_dataset
from egopatch.extract.worker.worker import slow_arithmetic

VERIFY_ANSWERS = ("yes", "no")
SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """Something odd.

    Attributes:
        what: in words.
        severity: `fault` or `note`.
        count: how many.
        found: all of them.
    """

    what: str
    severity: Literal["fault", "note"]
    count: int
    found: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Counts of the data set, what is odd about it, and what would make a job on this machine better."""

    counts: Mapping[str, int]
    findings: tuple[Finding, ...]
    advice: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether there is no fault."""
        return not any(finding.severity == "fault" for finding in self.findings)


def examine(config: Config) -> Diagnosis:
    """Read every annotation of every split that is there, look for every video, and look at the machine.

    Annotations that cannot be read are a fault, one entry a line or record; then nothing else is looked at.

    Raises:
        DatasetError: there is no folder `data.root`.
    """
    advice = tuple(line for line in (slow_arithmetic(config),) if line is not None)
    try:
        splits = _load_splits(config.data)
    except DatasetError as error:
        if not config.data.root.is_dir():
            raise
        return Diagnosis({}, (_fault("annotations that are missing or cannot be used", error.problems),), advice)
    dataset = splits[config.data.split]
    findings = [*_of_clips(config.data, dataset), *_across_splits(splits)]
    for split, one in splits.items():
        findings += _of_questions(f"{split}: " if len(splits) > 1 else "", one)
    return Diagnosis(_counts(splits, dataset), tuple(finding for finding in findings if finding.count), advice)


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis in a few lines."""
    lines = [f"{name:<26} {count}" for name, count in diagnosis.counts.items()]
    for finding in diagnosis.findings:
        rest = finding.count - SHOWN
        lines.append(f"{finding.severity}: {finding.count} {finding.what}")
        lines += [f"    {one}" for one in finding.found[:SHOWN]] + ([f"    and {rest} more"] if rest > 0 else [])
    lines += [] if diagnosis.findings else ["nothing odd found"]
    return "\n".join([*lines, *(f"advice: {line}" for line in diagnosis.advice)])


def _load_splits(data: DataConfig) -> dict[str, Dataset]:
    """The configured split first, then those others of EgoTaskQA that are there whole."""
    splits: dict[str, Dataset] = {data.split: load_dataset(data)}
    for split in egotaskqa.SPLITS if data.name == "egotaskqa" else ():
        if split not in splits and all(egotaskqa.annotation_file(data.root, split, part) for part in PARTS):
            splits[split] = load_dataset(dataclasses.replace(data, split=split))  # type: ignore[arg-type]
    return splits


def _counts(splits: Mapping[str, Dataset], dataset: Dataset) -> dict[str, int]:
    counts = {
        "clips": len(dataset.clips),
        "clips with a video": sum(clip.video.is_file() for clip in dataset.clips),
        "question texts": len(dataset.texts),
    }
    for split, one in splits.items():
        name = f"{split} " if len(splits) > 1 else ""
        counts[f"{name}answers"] = len(one.answers)
        for part, questions in one.questions.items():
            counts[f"{name}{part} questions"] = len(questions)
            forms = Counter(question.form for question in questions)
            counts |= {f"{name}{part} {form}": forms[form] for form in ("open", "binary")}
    return counts


def _of_clips(data: DataConfig, dataset: Dataset) -> Iterator[Finding]:
    def named(clips: Iterable[Clip]) -> list[str]:
        return [f"{clip.clip_id}: {clip.video}" for clip in clips]

    there = [clip for clip in dataset.clips if clip.video.is_file()]
    yield _fault("clips without a video file", named(clip for clip in dataset.clips if not clip.video.is_file()))
    yield _fault("clips with an empty video file", named(clip for clip in there if not clip.video.stat().st_size))
    asked = {question.clip_id for questions in dataset.questions.values() for question in questions}
    unasked = [clip.clip_id for clip in dataset.clips if clip.clip_id not in asked]
    yield _note(f"clips without a {data.split} question", unasked)
    if data.name == "egotaskqa":
        used = {clip.video for clip in dataset.clips}
        folder = data.root / egotaskqa.VIDEO_FOLDER
        yield _note("video files that no question asks of", sorted(str(p) for p in folder.glob("*") if p not in used))
        yield from _of_files(data)


def _of_files(data: DataConfig) -> Iterator[Finding]:
    """EgoTaskQA's annotation files: parts of one split from two folders, and a split that is not whole."""
    mixed, absent = [], []
    for split in egotaskqa.SPLITS:
        files = {part: egotaskqa.annotation_file(data.root, split, part) for part in PARTS}
        folders = sorted({str(file.parent) for file in files.values() if file is not None})
        if len(folders) > 1:
            mixed.append(f"{split}: {', '.join(folders)}")
        if folders:
            absent += [f"{split} {part}" for part, file in files.items() if file is None]
    yield _fault("splits whose parts come from different folders", mixed)
    yield _note("parts missing of a split that is not configured", absent)


def _of_questions(split: str, dataset: Dataset) -> Iterator[Finding]:
    """What is odd within one split."""
    everything = [(part, question) for part, questions in dataset.questions.items() for question in questions]
    part_of: dict[str, str] = {}
    trained = {(question.clip_id, question.text.lower()) for question in dataset.questions["train"]}
    doubled, leaked = [], []
    for part, question in everything:
        if question.question_id in part_of:
            doubled.append(f"{question.question_id}: {part_of[question.question_id]} and {part}")
        part_of[question.question_id] = part
        if part != "train" and (question.clip_id, question.text.lower()) in trained:
            leaked.append(f"{question.question_id} in {part}: {question.clip_id}: {question.text}")
    yield _fault(f"{split}question ids in more than one part", doubled)
    yield _fault(f"{split}val and test questions that training asks of the same clip", leaked)

    def told(part: str, question: Question) -> str:
        return f"{question.question_id} in {part}: {question.spelling!r}"

    yield _fault(
        f"{split}verify questions whose answer is neither yes nor no",
        [told(p, q) for p, q in everything if q.form == "binary" and q.answer not in VERIFY_ANSWERS],
    )
    answers = set(dataset.answers)
    yield _fault(
        f"{split}questions whose answer_encode is another answer",
        [
            f"{told(p, q)}, class {q.encoded} is {dataset.answers[q.encoded]!r}"
            for p, q in everything
            if q.encoded is not None and q.encoded > 1 and dataset.answers[q.encoded] != q.answer
        ],
    )
    yield _note(
        f"{split}val and test questions whose answer is not in the answer set, which no system can get right",
        [told(p, q) for p, q in everything if p != "train" and q.answer not in answers],
    )
    yield _note(
        f"{split}questions that the released files call unknown for a capital letter; here they count as they are",
        [told(p, q) for p, q in everything if q.encoded in (0, 1) and q.answer in answers],
    )


def _across_splits(splits: Mapping[str, Dataset]) -> Iterator[Finding]:
    """Ids that mean one question in one split and another one in another."""
    first: dict[str, tuple[str, Question]] = {}
    other = []
    for split, dataset in splits.items():
        for question in (question for questions in dataset.questions.values() for question in questions):
            known, same = first.setdefault(question.question_id, (split, question))
            meant = (question.clip_id, question.text, question.answer)
            if known != split and meant != (same.clip_id, same.text, same.answer):
                other.append(f"{question.question_id}: {same.text!r} in {known}, {question.text!r} in {split}")
    yield _fault("question ids that mean another question in the other split", other)


def _fault(what: str, found: Iterable[str]) -> Finding:
    return _finding(what, "fault", tuple(found))


def _note(what: str, found: Iterable[str]) -> Finding:
    return _finding(what, "note", tuple(found))


def _finding(what: str, severity: Literal["fault", "note"], found: tuple[str, ...]) -> Finding:
    return Finding(what, severity, len(found), found)
