"""`train score`: metrics of any system's answers."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from egopatch.configs.command_line import ConfigParser
from egopatch.configs.schema import ConfigError
from egopatch.extract.datasets import DatasetError, Question, egotaskqa, jsonl, qaego4d
from egopatch.extract.datasets.records import Part, answer_vocabulary
from egopatch.features.common.command_line import print_result
from egopatch.train.scores.metrics import (
    PredictionError,
    difference,
    holds_answers,
    lines,
    read_predictions,
    same_as_released,
    score,
    wrong_form_line,
)
from egopatch.train.scores.text_metrics import text_metrics

OWN = (".jsonl", *jsonl.TABLES)  # suffixes of files of your own questions; such a file holds all parts


@dataclass(frozen=True)
class QuestionFile:
    """A file of questions, and what its folder or its name says about them.

    Attributes:
        questions: The questions to score.
        vocabulary: The answer set; None if the folder has none.
        split: `direct` or `indirect`; None if neither the folder nor the file is named after one.
    """

    questions: tuple[Question, ...]
    vocabulary: tuple[str, ...] | None
    split: str | None


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Score the answers and print the metrics; returns 1 if the answers have faults."""
    _add_options(parser)
    options = parser.parse_args(list(args))
    if options.questions.resolve() == options.predictions.resolve():
        raise ConfigError(
            f"--questions and --predictions are both {options.questions}, whose answers would all be right; expected a "
            "system's answers in --predictions"
        )
    try:
        file = read_question_file(options.questions, options.part)
    except DatasetError:
        if holds_answers(options.questions):
            raise ConfigError(
                f"--questions is {options.questions}, whose lines are answers without a question; expected the file of "
                "the questions there, and the answers in --predictions: swap the two if they are the wrong way round"
            ) from None
        raise
    split = options.split or file.split
    try:
        answers = read_predictions(options.predictions, file.questions)
    except PredictionError as error:  # has a line for each fault
        print(f"{parser.prog}: failed: {error}", file=sys.stderr)
        return 1
    metrics = score(file.questions, answers, split)
    texts = text_metrics(file.questions, answers) if options.text else {}
    if file.vocabulary is None and any(question.encoded is None for question in file.questions):
        released = None
        if options.questions.suffix.lower() in OWN:
            missing, todo = f"{options.questions} has no questions of part train", "add some"
        else:
            missing = f"{options.questions.parent} has neither answer_set.txt nor training questions"
            todo = "put one of them there"
        if options.compare == "released":
            raise ConfigError(f"--compare is 'released', but {missing}; {todo}, or omit --compare")
        print(f"train score: no scores under the released matching rule: {missing}", file=sys.stderr)
    else:
        released = score(file.questions, answers, split, same_as_released(file.vocabulary or ()))
    if options.json:
        chosen = released if options.compare == "released" and released is not None else metrics
        print_result(True, chosen.as_json() | ({"text": texts} if texts else {}))
        # On standard error, because the layout of the JSON is fixed.
        print(f"train score: {wrong_form_line(metrics)}", file=sys.stderr)
        if released is not None:
            print(f"train score: {difference(metrics, released)}", file=sys.stderr)
    else:
        print("\n".join([*lines(metrics, released), *(f"{name} {value:.2f}" for name, value in texts.items())]))
    return 0


def _add_options(parser: ConfigParser) -> None:
    parser.usage = "--questions FILE --predictions FILE [options]"
    parser.add_argument(
        "--questions",
        type=Path,
        required=True,
        metavar="FILE",
        help="annotation file of EgoTaskQA or QAEgo4D, or .jsonl, .csv or .tsv file of your own questions",
    )
    parser.add_argument(
        "--predictions",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines, one per question: {"question_id", "answer"}',
    )
    parser.add_argument(
        "--split",
        type=str | None,
        default=None,
        help="also report accuracy over the questions with this tag; default: direct or indirect, if the folder or "
        "the file is named after it",
    )
    parser.add_argument(
        "--part",
        type=Literal["train", "val", "test"],
        default="test",
        help="part of a .jsonl, .csv or .tsv file to score",
    )
    parser.add_argument(
        "--compare",
        type=Literal["lower-cased", "released"],
        default="lower-cased",
        help="matching rule of the JSON output; the difference under the other rule goes to standard error",
    )
    parser.add_argument(
        "--text",
        action="store_true",
        help="also report BLEU-4, METEOR and ROUGE-L (pip install 'egopatch[text-metrics]')",
    )


def read_question_file(path: Path, part: Part) -> QuestionFile:
    """Read a file of questions; from a .jsonl, .csv or .tsv file, only those of `part`."""
    if path.suffix.lower() in OWN:
        parts = jsonl.read_questions(path)
        known = [question.spelling for question in parts["train"]]
        return QuestionFile(parts[part], answer_vocabulary(known) if known else None, None)
    if qaego4d.FILE_NAME.fullmatch(path.name):
        return QuestionFile(qaego4d.read_questions(path), None, None)
    folder = path.resolve().parent
    words = re.split("[^a-z]+", f"{folder.name} {path.stem}")
    split = next((word for word in words if word in egotaskqa.SPLITS), None)
    return QuestionFile(egotaskqa.read_questions(path), egotaskqa.read_answers(folder), split)
