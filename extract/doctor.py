"""A look at the data set and the machine: what is there, how many, and what is odd about it."""

from collections import Counter
from dataclasses import dataclass

from configs.schema import Config
from extract.datasets import load_dataset
from extract.worker import slow_arithmetic

VERIFY_ANSWERS = ("yes", "no")
SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """Something odd: `what` in words, `count` of them, the first few as `examples`."""

    what: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Counts of the data set, what is odd about it, and what would make a job on this machine better."""

    counts: dict[str, int]
    findings: tuple[Finding, ...]
    advice: tuple[str, ...]


def examine(config: Config) -> Diagnosis:
    """Read every annotation, look for every video, and look at the machine.

    Raises:
        DatasetError: annotations are missing or malformed; it lists every one.
    """
    data = config.data
    dataset = load_dataset(data)
    counts = {"clips": len(dataset.clips), "question texts": len(dataset.texts), "answers": len(dataset.answers)}
    for part, questions in dataset.questions.items():
        counts[f"{part} questions"] = len(questions)
    seen: dict[str, str] = {}
    doubled: list[str] = []
    odd_verify: list[str] = []
    for part, questions in dataset.questions.items():
        for question in questions:
            if question.question_id in seen:
                doubled.append(f"{question.question_id} in {seen[question.question_id]} and {part}")
            seen[question.question_id] = part
            if question.form == "binary" and question.answer.lower() not in VERIFY_ANSWERS:
                odd_verify.append(f"{question.question_id} in {part}: {question.answer!r}")
    answers = set(dataset.answers)
    unknown = [f"{q.question_id}: {q.answer!r}" for q in dataset.questions["test"] if q.answer not in answers]
    asked = Counter(question.clip_id for questions in dataset.questions.values() for question in questions)
    clips = dataset.clips
    findings = (
        _finding("clips without a video file", [f"{c.clip_id}: {c.video}" for c in clips if not c.video.is_file()]),
        _finding(f"clips without a {data.split} question", [c.clip_id for c in clips if c.clip_id not in asked]),
        _finding("question ids that occur twice", doubled),
        _finding("verify questions whose answer is neither yes nor no", odd_verify),
        _finding("test questions whose answer is not in the answer set", unknown),
    )
    advice = slow_arithmetic(config)
    return Diagnosis(counts, tuple(finding for finding in findings if finding.count), (advice,) if advice else ())


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis in a few lines."""
    lines = [f"{name:<20} {count}" for name, count in diagnosis.counts.items()]
    for finding in diagnosis.findings:
        lines.append(f"{finding.count} {finding.what}, such as")
        lines += [f"    {example}" for example in finding.examples]
    lines += [] if diagnosis.findings else ["nothing odd found"]
    return "\n".join([*lines, *(f"advice: {line}" for line in diagnosis.advice)])


def _finding(what: str, found: list[str]) -> Finding:
    return Finding(what, len(found), tuple(found[:SHOWN]))
