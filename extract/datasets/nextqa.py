"""NExT-QA's multiple choice as released: `{train,val,test}.csv`, `map_vid_vidorID.json`, and VidOR's videos.

A row has video, question, answer (the index of the right option), qid, type and options a0 to a4.
`map_vid_vidorID.json` says which file of `NExTVideo` a video is. Results are reported by type (such as `CW`, causal
why) and by its group: causal, temporal, descriptive.

Source: Xiao et al., "NExT-QA: Next phase of question-answering to explaining temporal actions", CVPR 2021.
"""

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

VIDEO_FOLDER = "NExTVideo"
MAP = "map_vid_vidorID.json"
COLUMNS = ("video", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")
GROUPS = {"C": "causal", "T": "temporal", "D": "descriptive"}


def load(root: Path, split: str) -> Dataset:
    """Clips and questions below `root`.

    Raises:
        DatasetError: A file is missing, or a row is malformed, repeats an id or names an unknown video; one line
            per fault.
    """
    problems: list[str] = []
    questions: dict[Part, list[Question]] = {part: [] for part in PARTS}
    videos: Mapping[str, str] = {}
    try:
        videos = _videos(root / MAP)
    except DatasetError as error:
        problems += error.problems
    for part in PARTS:
        try:
            rows = list(parsing.csv_rows(root / f"{part}.csv", f"NExT-QA's questions of {part}", COLUMNS))
        except DatasetError as error:
            problems += error.problems
            continue
        found = parsing.collect_unique(rows, partial(_question, videos=videos), problems, "qid")
        questions[part] = [question for _, question in found]
    if problems:
        raise DatasetError(problems)
    everything = [question for part in PARTS for question in questions[part]]
    names = sorted({question.clip_id for question in everything})
    return Dataset(
        clips=tuple(Clip(name, root / VIDEO_FOLDER / f"{videos[name]}.mp4") for name in names),
        questions={part: tuple(members) for part, members in questions.items()},
        answers=answer_vocabulary([]),
        texts=texts_of(everything),
        split=split,
    )


def _videos(path: Path) -> Mapping[str, str]:
    """Name of each video -> its file below the video folder, without the suffix."""
    found = parsing.read_json_object(path, "NExT-QA's file of each video", "names of files")
    if wrong := [name for name, file in found.items() if not isinstance(file, str)]:
        raise DatasetError(
            f"{path}: {wrong[0]!r} is a JSON {parsing.kind(found[wrong[0]])}; expected the name of a file"
        )
    return found


def _question(row: Mapping[str, Any], videos: Mapping[str, str]) -> Question:
    video, kind = parsing.clip_id_field(row, "video"), parsing.text_field(row, "type")
    if video not in videos:
        raise ValueError(f"'video' is {video!r}, which {MAP} does not name; expected one of its videos")
    if kind[0] not in GROUPS:
        raise ValueError(f"'type' is {kind!r}; expected one that starts with {', '.join(GROUPS)}")
    options = tuple(parsing.text_field(row, f"a{number}").strip() for number in range(5))
    index = parsing.text_field(row, "answer")
    if index not in ("0", "1", "2", "3", "4"):
        raise ValueError(f"'answer' is {index!r}; expected 0 to 4, the index of the right option")
    right = options[int(index)]
    return Question(
        question_id=f"{video}_{parsing.id_field(row, 'qid')}",
        clip_id=video,
        text=parsing.text_field(row, "question"),
        answer=right.lower(),
        form="open",
        tags=(GROUPS[kind[0]], kind),
        written=right,
        options=options,
    )
