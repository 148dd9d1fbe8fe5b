"""EgoSchema as released: `questions.json`, `subset_answers.json`, and `videos/{q_uid}.mp4`.

All questions belong to the part test, on which a head that was trained elsewhere is evaluated. The answers to 500
questions are published; accuracies are over those. A head's answers to all questions are written for the benchmark's
server.

Source: Mangalam et al., "EgoSchema: A diagnostic benchmark for very long-form video language understanding", NeurIPS
2023.
"""

from functools import partial
from pathlib import Path

from egopatch.extract.datasets import parsing
from egopatch.extract.datasets.records import (
    Clip,
    Dataset,
    DatasetError,
    Question,
    answer_vocabulary,
    texts_of,
)

VIDEO_FOLDER = "videos"
QUESTIONS, ANSWERS = "questions.json", "subset_answers.json"
OPTIONS = 5


def load(root: Path, split: str) -> Dataset:
    """Clips and questions below `root`.

    Raises:
        DatasetError: A file is missing, or a record is malformed or repeats an id; one line per fault.
    """
    problems: list[str] = []
    answers: dict[str, object] = {}
    try:
        answers = parsing.read_json_object(root / ANSWERS, "EgoSchema's published answers", "indices by q_uid")
    except DatasetError as error:
        problems += error.problems
    path = root / QUESTIONS
    try:
        records = parsing.read_json_records(path, "EgoSchema's questions")
    except DatasetError as error:
        raise DatasetError([*problems, *error.problems]) from None
    questions = parsing.collect_unique(records, partial(_question, answers=answers), problems, "q_uid")
    found = {question.question_id: question for _, question in questions}
    if not problems and (unknown := answers.keys() - found.keys()):
        problems.append(f"{root / ANSWERS}: has an answer for {min(unknown)!r}, which is not a question of {path}")
    if problems:
        raise DatasetError(problems)
    return Dataset(
        clips=tuple(Clip(name, root / VIDEO_FOLDER / f"{name}.mp4") for name in sorted(found)),
        questions={"train": (), "val": (), "test": tuple(found.values())},
        answers=answer_vocabulary([]),
        texts=texts_of(found.values()),
        split=split,
    )


def _question(record: object, answers: dict[str, object]) -> Question:
    fields = parsing.as_object(record)
    name = parsing.clip_id_field(fields, "q_uid")
    options = tuple(parsing.text_field(fields, f"option {number}").strip() for number in range(OPTIONS))
    right = ""
    if name in answers:
        index = answers[name]
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < OPTIONS:
            raise ValueError(f"its answer in {ANSWERS} is {index!r}; expected 0 to {OPTIONS - 1}")
        right = options[index]
    return Question(
        question_id=name,
        clip_id=name,
        text=parsing.text_field(fields, "question"),
        answer=right.lower(),
        form="open",
        tags=(),
        written=right,
        options=options,
    )
