"""What an adapter hands on: clips, questions, the answer vocabulary, and the one error that lists all faults."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")

# The released answer set starts with two unknowns; an answer outside the set is scored as the second one.
UNKNOWN_ANSWERS = ("<UNK0>", "<UNK1>")
MAX_ANSWERS = 4000


class DatasetError(ValueError):
    """Annotations that cannot be used.

    Attributes:
        problems: one line a fault, `file:position: what is wrong`, in the order of the files. The message is all of
            them, a line each.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)  # there may be millions
class Clip:
    """A stretch of video, one row of a store.

    Attributes:
        clip_id: unique name.
        video: file that holds it; it need not exist until its frames are asked for.
        start_s: first second of the stretch; None is the video's start.
        end_s: last second; None is the video's end.
    """

    clip_id: str
    video: Path
    start_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        if not self.clip_id:
            raise ValueError("clip_id is empty; expected a unique name")
        start = 0.0 if self.start_s is None else self.start_s
        if start < 0:
            raise ValueError(f"start_s is {start}; expected seconds from the video's start, at least 0")
        if self.end_s is not None and self.end_s <= start:
            raise ValueError(f"end_s is {self.end_s}; expected more than start_s, which is {start}")


@dataclass(frozen=True)
class Question:
    """What is asked of one clip.

    Attributes:
        question_id: unique within its part.
        clip_id: the clip it is asked of.
        text: the question as written.
        answer: lower-cased, spaces stripped.
        form: `binary` is EgoTaskQA's structural `verify` (yes or no), `open` all else.
        tags: reasoning types, in the order of the file.
        encoded: the class that the annotation file itself gives the answer, where it gives one. The released files
            encode some answers of val and test as unknown only because they hold capital letters.
        written: the answer in the file's own spelling, spaces stripped; None where that is `answer`.
    """

    question_id: str
    clip_id: str
    text: str
    answer: str
    form: Literal["open", "binary"]
    tags: tuple[str, ...]
    encoded: int | None = None
    written: str | None = None

    @property
    def spelling(self) -> str:
        """The answer as the file spells it."""
        return self.answer if self.written is None else self.written


@dataclass(frozen=True)
class Dataset:
    """Clips and questions of one experiment.

    Attributes:
        clips: of every split that is present, sorted by clip_id, so that one store serves all splits.
        questions: of the configured split, by part.
        answers: the answer vocabulary; the index is the class.
        texts: unique question texts of every split that is present, sorted.
        split: the configured split.
    """

    clips: tuple[Clip, ...]
    questions: Mapping[Part, tuple[Question, ...]]
    answers: tuple[str, ...]
    texts: tuple[str, ...]
    split: str

    @cached_property
    def _classes(self) -> dict[str, int]:
        return {answer: index for index, answer in enumerate(self.answers)}

    def class_of(self, answer: str) -> int:
        """Class of an answer in any spelling; one outside the vocabulary gets the class of `<UNK1>`."""
        return self._classes.get(answer.strip().lower(), self._classes[UNKNOWN_ANSWERS[1]])


def answer_vocabulary(train_answers: Sequence[str], limit: int = MAX_ANSWERS) -> tuple[str, ...]:
    """The answer set by EgoTaskQA's released rule, for annotations that come without `answer_set.txt`.

    Two unknowns, then the `limit` most frequent training answers, lower-cased. As released, frequencies are counted
    before lower-casing and ties keep the order of first appearance.

    Args:
        train_answers: as the file spells them.
        limit: how many are kept.

    Source: EgoTaskQA, `baselines/preprocess/preprocess_vocab.py`.
    """
    frequent = (answer.strip().lower() for answer, _ in Counter(train_answers).most_common(limit))
    return tuple(dict.fromkeys((*UNKNOWN_ANSWERS, *frequent)))
