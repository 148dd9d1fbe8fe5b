"""Your own videos: two files with one JSON object per line.

Clips: `{"clip_id": "kitchen-01", "video": "videos/kitchen.mp4", "start_s": 12.0, "end_s": 17.5}`. `video` is relative
to the data root; without `start_s` and `end_s` the clip is the whole video. Where `end_s` lies beyond the video's end,
the clip ends with the video. A clip_id may have slashes (`P01/P01_01`).

Questions: `{"question_id": "1", "clip_id": "kitchen-01", "question": "what is opened?", "answer": "fridge",
"part": "train"}`. `part` is train, val or test; an answer may be a number. Optional: `form` (`open` or `binary`; by
default a question is binary if its answer is yes or no) and `tags`, a list of strings by which results are reported
too.

The questions may also be a table, `data.questions: NAME.csv` or `NAME.tsv`, as spreadsheets export it (UTF-8; commas,
semicolons or tabs): a header with the same names, a question a row, and `|` between the tags or the options of one
cell. An empty cell counts as no value.

Without questions (`data.questions: null`) the clips alone are encoded; `egopatch extract videos` writes such a file.

Multiple choice: `{"options": ["fridge", "door", "jar"], "answer_index": 0}` in place of `answer`, in all questions or
none. A question has two to 26 options, all different; each is the text of an answer.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

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
from egopatch.features.io.fields import garbage_collection_paused

CLIP_KEYS = ("clip_id", "video", "start_s", "end_s")
QUESTION_KEYS = ("question_id", "clip_id", "question", "answer", "part", "form", "tags", "options", "answer_index")
TABLES = (".csv", ".tsv")
REQUIRED_COLUMNS = ("question_id", "clip_id", "question", "part")


def load(clips_file: Path, questions_file: Path | None, root: Path, split: str) -> Dataset:
    """Clips and questions of two files.

    Args:
        clips_file: File with one clip per line.
        questions_file: File with one question per line, with its part; None if there are no questions.
        root: Folder that relative video paths start from.
        split: Tag on which the published "All" is counted; copied into the result.

    Raises:
        DatasetError: A file is missing, a line is malformed, an id is repeated or a question names an unknown clip;
            one line per fault. Unknown clips are named only if the file of the clips has no fault.
    """
    problems: list[str] = []
    video = cache(root.__truediv__)  # many clips share a video
    if clips_file.suffix.lower() in TABLES:
        raise DatasetError(
            [f"data.clips is {clips_file}, which is a table; expected a file with one JSON object per line"]
        )
    lines = parsing.json_lines(clips_file, "the clips, one JSON object per line (data.clips)")
    with garbage_collection_paused():
        parse, id_of = partial(_clip, video=video), attrgetter("clip_id")
        found = parsing.collect_unique(lines, parse, problems, "clip_id", id_of)
        clips = {clip.clip_id: clip for _, clip in found}
    known = not problems  # the id of a malformed line is not in `clips`, so its questions would seem to have no clip
    questions: dict[Part, list[Question]] = {part: [] for part in PARTS}
    alike: dict[str, str] = {}
    try:
        numbered = () if questions_file is None else _numbered(questions_file, problems)
        for position, part, question in numbered:
            if known and question.clip_id not in clips:
                alike = alike or {parsing.compared(clip_id): clip_id for clip_id in clips}
                problems.append(f"{position}: {_unknown(question.clip_id, alike, clips_file)}")
            questions[part].append(question)
    except DatasetError as error:
        problems += error.problems
    if not clips and not problems:
        problems.append(f"{clips_file}: contains no clip; expected one JSON object per line")
    if questions_file is not None and not any(questions.values()) and not problems:
        problems.append(_no_question(questions_file))
    if problems:
        raise DatasetError(problems)
    return Dataset(
        clips=tuple(clips[clip_id] for clip_id in sorted(clips)),
        questions={part: tuple(members) for part, members in questions.items()},
        answers=answer_vocabulary([question.spelling for question in questions["train"] if not question.options]),
        texts=texts_of(question for members in questions.values() for question in members),
        split=split,
    )


def read_questions(path: Path) -> dict[Part, tuple[Question, ...]]:
    """The questions of a file by part, without their clips.

    Raises:
        DatasetError: The file is missing, a line is malformed or an id is repeated.
    """
    problems: list[str] = []
    questions: dict[Part, list[Question]] = {part: [] for part in PARTS}
    try:
        for _, part, question in _numbered(path, problems):
            questions[part].append(question)
    except DatasetError as error:
        problems += error.problems
    if not any(questions.values()) and not problems:
        problems.append(_no_question(path))
    if problems:
        raise DatasetError(problems)
    return {part: tuple(members) for part, members in questions.items()}


def _unknown(clip_id: str, alike: Mapping[str, str], clips_file: Path) -> str:
    if near := alike.get(parsing.compared(clip_id)):
        # As ASCII, because the two may look the same.
        return f"clip_id {clip_id!a} is not a clip of {clips_file}, which has {near!a}; use one spelling in both files"
    # An id shows the form of all: `extract videos` takes the file's name with its ending, and `@10s` for a part of it.
    has = f", which has ids such as {next(iter(alike.values()))!r}" if alike else ""
    return f"clip_id {clip_id!r} is not a clip of {clips_file}{has}; correct it, or add the clip there"


def _no_question(path: Path) -> str:
    return f"{path}: contains no question; expected one per line"


def _numbered(path: Path, problems: list[str]) -> Iterator[tuple[str, Part, Question]]:
    """Position, part and question of every well-formed line; faults are added to `problems`."""
    parse: Callable[[Any], tuple[Part, Question]] = _question
    if path.suffix.lower() in TABLES:
        records = parsing.csv_rows(path, "the questions, CSV in UTF-8 with a header (data.questions)", REQUIRED_COLUMNS)
        parse = _question_of_row
    else:
        records = parsing.json_lines(path, "the questions, one JSON object per line (data.questions)")
    found = parsing.collect_unique(records, parse, problems, "question_id", lambda row: row[1].question_id)
    return ((position, part, question) for position, (part, question) in found)


def _clip(record: object, video: Callable[[str], Path]) -> Clip:
    fields = parsing.as_object(record, CLIP_KEYS)
    return Clip(
        clip_id=parsing.clip_path_field(fields, "clip_id"),
        video=video(parsing.path_field(fields, "video")),
        start_s=parsing.seconds_field(fields, "start_s"),
        end_s=parsing.seconds_field(fields, "end_s"),
    )


def _question(record: object) -> tuple[Part, Question]:
    fields = parsing.as_object(record, QUESTION_KEYS)
    part = _one_of(fields, "part", PARTS)
    options = parsing.texts_field(fields, "options")
    if "answer_index" in fields and not options:
        raise ValueError("'answer_index' is given without options; give both, or 'answer'")
    written = _right_option(fields, options) if options else parsing.answer_field(fields, "answer").strip()
    answer = written.lower()
    form: Literal["open", "binary"] = "binary" if answer in ("yes", "no") and not options else "open"
    if "form" in fields:
        form = _one_of(fields, "form", ("open", "binary"))
    question = Question(
        question_id=parsing.id_field(fields, "question_id"),
        clip_id=parsing.clip_path_field(fields, "clip_id"),
        text=parsing.text_field(fields, "question"),
        answer=answer,
        form=form,
        tags=parsing.texts_field(fields, "tags"),
        written=written,
        options=options,
    )
    return part, question


def _question_of_row(row: object) -> tuple[Part, Question]:
    fields: dict[str, Any] = {key: cell.strip() for key, cell in parsing.as_object(row).items() if (cell or "").strip()}
    for key in ("tags", "options"):
        if key in fields:
            fields[key] = [text.strip() for text in fields[key].split("|")]
    if (index := fields.get("answer_index", "")).isdecimal():
        fields["answer_index"] = int(index)
    return _question(fields)


def _right_option(fields: Mapping[str, Any], options: tuple[str, ...]) -> str:
    compared = [option.strip().lower() for option in options]
    if twice := next((option for place, option in enumerate(compared) if option in compared[:place]), None):
        raise ValueError(f"has the option {twice!r} twice; expected each option once")
    index = fields.get("answer_index")
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(options):
        raise ValueError(
            f"'answer_index' is {index!r}; expected 0 to {len(options) - 1}, the index of the right option"
        )
    if "answer" in fields and fields["answer"] != options[index]:
        raise ValueError(f"'answer' is {fields['answer']!r}, but option {index} is {options[index]!r}; remove one")
    return options[index].strip()


def _one_of(fields: Mapping[str, Any], key: str, choices: tuple[Any, ...]) -> Any:
    value = fields.get(key)
    if value not in choices:
        found = repr(value) if key in fields else "missing"
        raise ValueError(f"{key!r} is {found}; expected {', '.join(choices[:-1])} or {choices[-1]}")
    return value
