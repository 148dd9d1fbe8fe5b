"""EgoTaskQA's annotations, in all layouts in which they are distributed.

As released: `ROOT/qa/{direct,indirect}/formatted_{train,val,test}_qas_encode.json`, `answer_set.txt` beside them, and
videos `ROOT/qa_videos/INTERVAL.mp4`, where INTERVAL is like `vid|P1|start|end` (the pipes are part of the file name)
and is the clip's id. `qa_ori/` may stand in for `qa/`, and either may be in `Data/`, as packed by EgoVLPv2's authors.
The files of earlier steps of the released preprocessing are read too: `{part}_qas_encode.json` and `{part}_qas.json`.
So is `formatted_{part}_qas_encode4.json`, which adds a paraphrase (`text_pos`) and a counterfactual (`text_neg`) of
each question; it is preferred if `data.paraphrases` is set.
Without `answer_set.txt` the answer set is built from the training answers by the released rule.

Source: EgoTaskQA (Jia et al., NeurIPS 2022), `baselines/preprocess`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from egopatch.extract.datasets import parsing
from egopatch.extract.datasets.records import (
    PARTS,
    UNKNOWN_ANSWERS,
    Clip,
    Dataset,
    DatasetError,
    Part,
    Question,
    answer_vocabulary,
    texts_of,
)

SPLITS = ("direct", "indirect")
ANNOTATION_FOLDERS = ("qa", "qa_ori", "Data/qa", "Data/qa_ori")
FILE_NAMES = ("formatted_{part}_qas_encode.json", "{part}_qas_encode.json", "{part}_qas.json")
PARAPHRASED = "formatted_{part}_qas_encode4.json"
ANSWER_SET = "answer_set.txt"
VIDEO_FOLDER = "qa_videos"


def load(root: Path, split: str, paraphrases: bool = False) -> Dataset:
    """Every clip under `root` and the questions of one split.

    Args:
        root: Folder with `qa` (or `qa_ori`) and `qa_videos`.
        split: `direct` or `indirect`. Its three parts must be present; the other split is read if it is present, so
            that its clips and texts are part of the same store.
        paraphrases: Whether to read the variants of the training questions.

    Raises:
        DatasetError: Files are missing or records are malformed; one line per fault.
    """
    problems: list[str] = []
    questions: dict[str, dict[Part, tuple[Question, ...]]] = {}
    for name in SPLITS:
        questions[name] = {}
        for part in PARTS:
            path = annotation_file(root, name, part, paraphrases)
            if path is None:
                if name == split:
                    problems.append(_missing(root, name, part))
                continue
            try:
                questions[name][part] = read_questions(path, variants=paraphrases and part == "train")
            except DatasetError as error:
                problems.extend(error.problems)
    if problems:
        raise DatasetError(problems)
    train = annotation_file(root, split, "train", paraphrases)
    assert train is not None
    answers = _answers(train.parent, questions[split]["train"])
    _check_encoded(root, split, questions[split], len(answers), paraphrases)
    everything = [question for parts in questions.values() for part in parts.values() for question in part]
    return Dataset(
        clips=tuple(
            Clip(clip_id, root / VIDEO_FOLDER / f"{clip_id}.mp4") for clip_id in sorted({q.clip_id for q in everything})
        ),
        questions=questions[split],
        answers=answers,
        texts=texts_of(everything),
        split=split,
    )


def annotation_file(root: Path, split: str, part: Part, paraphrases: bool = False) -> Path | None:
    """File with the questions of a part, in the first layout that has it; None if no layout does."""
    usual = [(folder, name) for folder in ANNOTATION_FOLDERS for name in FILE_NAMES]
    paraphrased = [(folder, PARAPHRASED) for folder in ANNOTATION_FOLDERS]
    layouts = [*paraphrased, *usual] if paraphrases else [*usual, *paraphrased]
    paths = (root / folder / split / name.format(part=part) for folder, name in layouts)
    return next((path for path in paths if path.is_file()), None)


def read_questions(path: Path, variants: bool = False) -> tuple[Question, ...]:
    """The questions of one annotation file, in its order; with `variants` if set, which every record must then have.

    Raises:
        DatasetError: The file is missing or truncated, or records are malformed or repeat a question_id.
    """
    problems: list[str] = []
    records = parsing.read_json_records(path, "an EgoTaskQA annotation file, a JSON list of questions")
    if variants and not any(isinstance(record, dict) and "text_pos" in record for _, record in records):
        raise DatasetError(
            [
                f"{path}: no record has 'text_pos' and 'text_neg', which data.paraphrases needs; expected them in "
                f"{PARAPHRASED.format(part='train')}; if this is EgoSynth, render it again with this version"
            ]
        )
    found = parsing.collect_unique(records, partial(_question, variants=variants), problems, "question_id")
    questions = tuple(question for _, question in found)
    if not records:
        problems.append(f"{path}: contains no question; expected a list of question records")
    if problems:
        raise DatasetError(problems)
    return questions


def read_answers(folder: Path) -> tuple[str, ...] | None:
    """The answer set of the annotations in `folder`: its `answer_set.txt`, or built from its training answers.

    Returns:
        None if the folder has neither.

    Raises:
        DatasetError: The file is malformed.
    """
    if (folder / ANSWER_SET).is_file():
        return _answers(folder, ())
    names = (*FILE_NAMES, PARAPHRASED)
    train = next((path for name in names if (path := folder / name.format(part="train")).is_file()), None)
    return None if train is None else _answers(folder, read_questions(train))


def _question(record: object, variants: bool) -> Question:
    fields = parsing.as_object(record)
    structural = parsing.text_field(fields, "structural")
    if structural not in ("query", "verify"):
        raise ValueError(f"'structural' is {structural!r}; expected 'query' or 'verify'")
    form: Literal["open", "binary"] = "binary" if structural == "verify" else "open"
    written = parsing.text_field(fields, "answer").strip()
    return Question(
        question_id=parsing.id_field(fields, "question_id"),
        clip_id=parsing.clip_id_field(fields, "interval"),
        text=parsing.text_field(fields, "question"),
        answer=written.lower(),
        form=form,
        tags=_tags(fields),
        encoded=_encoded(fields),
        written=written,
        variants=(parsing.text_field(fields, "text_pos"), parsing.text_field(fields, "text_neg")) if variants else None,
    )


def _tags(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """`reasoning_type` split at its dollar signs, or the same tags from the single fields."""
    if "reasoning_type" in fields:
        tags = tuple(parsing.text_field(fields, "reasoning_type").split("$"))
    else:
        tags = (
            *parsing.texts_field(fields, "type"),
            *parsing.texts_field(fields, "category"),
            *(parsing.text_field(fields, key) for key in ("semantic", "structural", "reference")),
        )
    return tuple(dict.fromkeys(tag for tag in tags if tag))


def _encoded(fields: Mapping[str, Any]) -> int | None:
    """`answer_encode`, a number or (in `*_qas_encode.json`) its digits."""
    value = fields.get("answer_encode")
    if value is None:
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"'answer_encode' is {value!r}; expected a class, a whole number from 0")
    return value


def _answers(folder: Path, train: Sequence[Question]) -> tuple[str, ...]:
    """The answer set in `folder`; without a file, the one that the released rule builds from the training questions."""
    path = folder / ANSWER_SET
    if not path.is_file():
        return answer_vocabulary([question.spelling for question in train])
    lines = parsing.read_text(path, "one answer per line").removesuffix("\n").split("\n")
    first: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, start=1):
        # Questions' answers are in lower case, so none would match an entry in another spelling.
        answer = line.strip() if line.strip() in UNKNOWN_ANSWERS else line.strip().lower()
        if answer in first:
            problems.append(
                f"{path}:{number}: answer {answer!r} is also on line {first[answer]}; expected each answer once"
            )
        first.setdefault(answer, number)
    if UNKNOWN_ANSWERS[1] not in first:
        problems.append(
            f"{path}:1: the line {UNKNOWN_ANSWERS[1]} is missing; expected the released answer set, which "
            "starts with it"
        )
    if problems:
        raise DatasetError(problems)
    return tuple(first)


def _check_encoded(
    root: Path, split: str, questions: dict[Part, tuple[Question, ...]], classes: int, paraphrases: bool
) -> None:
    problems = [
        f"{annotation_file(root, split, part, paraphrases)}:record {number}: 'answer_encode' is {question.encoded}; "
        f"expected 0 to {classes - 1}, the classes of the answer set"
        for part, members in questions.items()
        for number, question in enumerate(members, start=1)
        if question.encoded is not None and question.encoded >= classes
    ]
    if problems:
        raise DatasetError(problems)


def _missing(root: Path, split: str, part: Part) -> str:
    expected = root / ANNOTATION_FOLDERS[0] / split / FILE_NAMES[0].format(part=part)
    others = ", ".join(name.format(part=part) for name in FILE_NAMES[1:])
    folders = ", ".join(f"{name}/" for name in ANNOTATION_FOLDERS[1:])
    return (
        f"{expected}: no such file; expected EgoTaskQA's {part} questions of the {split} split there "
        f"(or {others}, or in {folders}); check data.root, which is {str(root)!r} "
        "(egopatch extract data downloads EgoTaskQA)"
    )
