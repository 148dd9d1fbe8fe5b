"""QAEgo4D as released: `annotations.{train,val,test}.json`, and Ego4D's clips as `clips/{video_id}.mp4`.

`qaego4d` is the open set: answers are classes of the training answers. `qaego4d-close` is the 4-way choice, whose
records have three `wrong_answers`. `video_id` is the uid of an Ego4D clip; a question is about the whole clip.

Source: Barmann and Waibel, "Where did I leave my keys?", CVPR workshops 2022; QAEgo4D-Close: Di and Xie, "Grounded
question-answering in long egocentric videos", CVPR 2024.
"""

import random
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from egopatch.extract.datasets import parsing
from egopatch.extract.datasets.records import (
    PARTS,
    Clip,
    Dataset,
    DatasetError,
    Part,
    Question,
    answer_vocabulary,
    texts_of,
)
from egopatch.features.common.units import counted

CLIP_FOLDER = "clips"
FILE_NAME = re.compile(r"annotations\.(train|val|test)\.json")
WRONG = 3


def load(root: Path, split: str, close: bool) -> Dataset:
    """Clips and questions below `root`.

    Args:
        root: Folder with the annotation files and `clips`.
        split: Copied into the result.
        close: Whether to read the 4-way choice. The question's id decides the position of the right answer.

    Raises:
        DatasetError: A file is missing, or a record is malformed or repeats an id; one line per fault.
    """
    problems: list[str] = []
    questions: dict[Part, tuple[Question, ...]] = {}
    for part in PARTS:
        try:
            questions[part] = read_questions(root / f"annotations.{part}.json", close)
        except DatasetError as error:
            problems += error.problems
    if problems:
        raise DatasetError(problems)
    everything = [question for part in PARTS for question in questions[part]]
    return Dataset(
        clips=tuple(Clip(name, root / CLIP_FOLDER / f"{name}.mp4") for name in sorted({q.clip_id for q in everything})),
        questions=questions,
        answers=answer_vocabulary([] if close else [question.spelling for question in questions["train"]]),
        texts=texts_of(everything),
        split=split,
        free_answers=not close,
    )


def read_questions(path: Path, close: bool = False) -> tuple[Question, ...]:
    """The questions of one part.

    Raises:
        DatasetError: As `load`.
    """
    problems: list[str] = []
    records = parsing.read_json_records(path, "QAEgo4D's questions of one part")
    found = parsing.collect_unique(records, partial(_question, close=close), problems, "sample_id")
    questions = tuple(question for _, question in found)
    if problems:
        raise DatasetError(problems)
    return questions


def _question(record: object, close: bool) -> Question:
    fields = parsing.as_object(record)
    written = parsing.text_field(fields, "answer").strip()
    name = parsing.id_field(fields, "sample_id")
    return Question(
        question_id=name,
        clip_id=parsing.clip_id_field(fields, "video_id"),
        text=parsing.text_field(fields, "question"),
        answer=written.lower(),
        form="binary" if written.lower() in ("yes", "no") and not close else "open",
        tags=(),
        written=written,
        options=_options(fields, name, written) if close else (),
    )


def _options(fields: Mapping[str, Any], name: str, right: str) -> tuple[str, ...]:
    wrong = parsing.texts_field(fields, "wrong_answers")
    if len(wrong) != WRONG:
        raise ValueError(f"'wrong_answers' has {counted(len(wrong), 'answer')}; expected {WRONG}, as in QAEgo4D-Close")
    options = [right, *wrong]
    random.Random(name).shuffle(options)
    return tuple(options)
