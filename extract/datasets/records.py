"""The result of every adapter: clips, questions and the answer vocabulary; and the error that lists all faults."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Literal

from egopatch.features.common.command_line import pick_varied
from egopatch.features.common.units import counted
from egopatch.features.values.errors import require_type

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")

# The released answer set starts with two unknown answers; an answer outside the set is scored as the second one.
UNKNOWN_ANSWERS = ("<UNK0>", "<UNK1>")
MAX_ANSWERS = 4000
MIN_OPTIONS, MAX_OPTIONS = 2, 26
# Faults that the message of a DatasetError lists.
SHOWN_PROBLEMS = 10


class DatasetError(ValueError):
    """Annotations that cannot be used.

    Attributes:
        problems: One line per fault, `file:position: what is wrong`, in the order of the files. The message lists
            ten of them, of as many kinds as possible, and counts the others.

    Raises:
        ValueError: `problems` is empty or has a blank line, so that commands could not say what is wrong.
    """

    def __init__(self, problems: Iterable[str] | str):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if not self.problems or not all(str(problem).strip() for problem in self.problems):
            raise ValueError(f"problems is {self.problems!r:.200}; expected one line for each fault, at least one")
        hidden = len(self.problems) - SHOWN_PROBLEMS
        more = (
            [f"and {hidden:,} more; `egopatch extract doctor --json --config CONFIG` lists them all"]
            if hidden > 0
            else []
        )
        super().__init__("\n".join([*pick_varied(self.problems, SHOWN_PROBLEMS), *more]))

    def __reduce__(self) -> tuple[type["DatasetError"], tuple[tuple[str, ...]]]:
        return DatasetError, (self.problems,)


@dataclass(frozen=True, slots=True)  # there may be millions
class Clip:
    """A stretch of video, one row of a store.

    Attributes:
        clip_id: Unique name.
        video: Video file; it need not exist until its frames are read.
        start_s: First second of the clip; None is the video's start.
        end_s: Last second of the clip; None is the video's end.
    """

    clip_id: str
    video: Path
    start_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        if not self.clip_id:
            raise ValueError(f"clip_id is {self.clip_id!r}; expected a unique name")
        start, end = 0.0 if self.start_s is None else self.start_s, self.end_s
        if not isinstance(start, Real) or not isinstance(end, Real | None):
            return  # the registry refuses values of the wrong type, all of them at once
        if start < 0:
            raise ValueError(
                f"clip {self.clip_id!r}: start_s is {start}; expected seconds from the video's start, at least 0"
            )
        if end is not None and end <= start:
            raise ValueError(f"clip {self.clip_id!r}: end_s is {end}; expected more than start_s, which is {start}")


@dataclass(frozen=True, slots=True)  # there may be millions
class Question:
    """A question about one clip.

    Attributes:
        question_id: Id, unique within its part.
        clip_id: Id of the clip.
        text: The question as written.
        answer: The answer in lower case, without surrounding spaces.
        form: `binary` for EgoTaskQA's structural type `verify` (yes or no), `open` for all others.
        tags: Reasoning types, in the order of the file.
        encoded: Class of the answer in the annotation file, if it has one. The released files encode some answers of
            val and test as unknown only because they contain capital letters.
        written: The answer in the file's own spelling, without surrounding spaces; None if that equals `answer`.
        options: Answers to choose from, if it is a multiple-choice question; `answer` is one of them, or empty where
            the right one is not published.
        variants: The training question in other words (paraphrase), and a similar question about something else
            (counterfactual); None for other questions, or if `data.paraphrases` does not ask for them.

    Raises:
        ValueError: There are too few or too many options, or none of them is the answer.
    """

    question_id: str
    clip_id: str
    text: str
    answer: str
    form: Literal["open", "binary"]
    tags: tuple[str, ...]
    encoded: int | None = None
    written: str | None = None
    options: tuple[str, ...] = ()
    variants: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.written == self.answer:
            object.__setattr__(self, "written", None)
        if not self.options:
            return
        options: object = self.options
        if not isinstance(options, tuple | list) or not all(isinstance(option, str) for option in options):
            return  # the registry refuses values of the wrong type, all of them at once
        named = f"question {self.question_id!r} has"
        if not MIN_OPTIONS <= len(self.options) <= MAX_OPTIONS:
            raise ValueError(f"{named} {counted(len(self.options), 'option')}; expected {MIN_OPTIONS} to {MAX_OPTIONS}")
        compared = [option.strip().lower() for option in self.options]
        if self.answer and self.answer not in compared:
            raise ValueError(
                f"{named} the answer {self.answer!r}, which is not one of its options {', '.join(compared)}"
            )

    @property
    def counts(self) -> bool:
        """Whether metrics count the question: benchmarks publish no answer to some multiple-choice questions."""
        return bool(self.answer or not self.options)

    @property
    def answer_index(self) -> int | None:
        """Index of the right option; None if there are no options, or the right one is not published."""
        if not self.options or not self.answer:
            return None
        return [option.strip().lower() for option in self.options].index(self.answer)

    @property
    def spelling(self) -> str:
        """The answer in the file's own spelling."""
        return self.answer if self.written is None else self.written


@dataclass(frozen=True)
class Dataset:
    """Clips and questions of one experiment.

    Attributes:
        clips: Clips of every split that is present, sorted by clip_id, so that one store serves all splits.
        questions: Questions of the configured split, by part.
        answers: Answer vocabulary; the index is the class.
        texts: Unique texts of questions and options of every split that is present, sorted.
        split: The configured split.
        free_answers: Whether answers are free text, so that the table also shows how close wrong ones are to the
            annotated ones, by BLEU-4, METEOR and ROUGE-L.

    Raises:
        DatasetError: `questions` does not map each part to a sequence of `Question`; only some questions have options;
            or only some training questions have variants.
    """

    clips: tuple[Clip, ...]
    questions: Mapping[Part, tuple[Question, ...]]
    answers: tuple[str, ...]
    texts: tuple[str, ...]
    split: str
    free_answers: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.questions, Mapping):
            raise DatasetError(f"questions is of type {type(self.questions).__name__}; expected a dict by part")
        for part, questions in self.questions.items():
            if isinstance(questions, str) or not isinstance(questions, Sequence):
                raise DatasetError(f"questions[{part!r}] is of type {type(questions).__name__}; expected a tuple")
            if strange := [question for question in questions if not isinstance(question, Question)]:
                raise DatasetError(f"questions[{part!r}] contains {strange[0]!r:.200}; expected a Question")
        everything = [question for questions in self.questions.values() for question in questions]
        without = [question.question_id for question in everything if not question.options]
        if 0 < len(without) < len(everything):
            some = f"questions without options: {len(without)} of {len(everything)}, such as {without[0]!r}"
            raise DatasetError([f"{some}; expected options for all questions or none"])
        train = self.questions.get("train", ())
        without = [question.question_id for question in train if question.variants is None]
        if 0 < len(without) < len(train):
            some = f"training questions without a paraphrase: {len(without)} of {len(train)}, such as {without[0]!r}"
            raise DatasetError([f"{some}; expected paraphrases of all training questions or none"])

    @cached_property
    def choices(self) -> int:
        """Largest number of options of a question; 0 if the questions have none."""
        return max((len(q.options) for questions in self.questions.values() for q in questions), default=0)

    @cached_property
    def _classes(self) -> dict[str, int]:
        return {answer: index for index, answer in enumerate(self.answers)}

    def class_of(self, answer: str) -> int:
        """Class of an answer in any spelling; an answer outside the vocabulary has the class of `<UNK1>`."""
        return self._classes.get(answer.strip().lower(), self._classes[UNKNOWN_ANSWERS[1]])


def texts_of(questions: Iterable[Question]) -> tuple[str, ...]:
    """Unique texts of the questions, their options and their variants, sorted.

    Raises:
        TypeError: `questions` holds something else, such as the names of the parts.
    """
    questions = list(questions)
    for question in questions:
        require_type(
            "an item of questions", question, Question, "a Question: give the questions of all parts in a list"
        )
    texts = ((question.text, *question.options, *(question.variants or ())) for question in questions)
    return tuple(sorted({text for of_question in texts for text in of_question}))


def answer_vocabulary(train_answers: Sequence[str], limit: int = MAX_ANSWERS) -> tuple[str, ...]:
    """The answer set by EgoTaskQA's released rule, for annotations without `answer_set.txt`.

    Two unknown answers, then the `limit` most frequent training answers in lower case. As in the released code,
    frequencies are counted before lower-casing and ties keep the order of first appearance.

    Args:
        train_answers: Training answers in the file's own spelling.
        limit: Number of answers to keep.

    Raises:
        TypeError: `train_answers` is one answer, or holds something else than texts.

    Source: EgoTaskQA, `baselines/preprocess/preprocess_vocab.py`.
    """
    if isinstance(train_answers, str):
        raise TypeError(f"train_answers is {train_answers!r:.60}; expected a list of answers")
    for answer in train_answers:
        require_type("an item of train_answers", answer, str, "an answer as text: question.answer")
    frequent = (answer.strip().lower() for answer, _ in Counter(train_answers).most_common(limit))
    return tuple(dict.fromkeys((*UNKNOWN_ANSWERS, *frequent)))
