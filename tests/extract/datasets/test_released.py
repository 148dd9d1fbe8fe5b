"""QAEgo4D, NExT-QA and EgoSchema: tiny made-up samples in the released layouts, and records that cannot be used."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from egopatch.configs.schema import DataConfig
from egopatch.extract.datasets import Dataset, DatasetError, load_dataset

PARTS = ("train", "val", "test")
COLUMNS = ("video", "frame_count", "width", "height", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3", "a4")


def qaego4d(root: Path, **changes: Any) -> None:
    """`changes` go into the second record of train."""
    for number, part in enumerate(PARTS):
        records: list[dict[str, Any]] = [
            {
                "video_id": f"uid-{number}",
                "sample_id": 10 * number + place,
                "question": "Where did I leave the keys?",
                "answer": ("On the Table", "in the drawer")[place],
                "moment_start_frame": 0,
                "moment_end_frame": 60,
                "wrong_answers": ["under the bed", "in the car", "on the shelf"],
            }
            for place in range(2)
        ]
        if part == "train":
            records[1] |= changes
        (root / f"annotations.{part}.json").write_text(json.dumps(records))


def nextqa(root: Path, **changes: Any) -> None:
    """`changes` go into the second row of train."""
    (root / "map_vid_vidorID.json").write_text(json.dumps({"100": "1164/100", "200": "0007/200"}))
    for number, part in enumerate(PARTS):
        rows: list[dict[str, Any]] = [
            {
                **dict.fromkeys(COLUMNS, ""),
                "video": video,
                "question": f"why did the boy, in red, run in {part}",
                "answer": 2,
                "qid": number,
                "type": kind,
                **{f"a{n}": f"option {n}" for n in range(5)},
            }
            for video, kind in (("100", "CW"), ("200", "TN"))
        ]
        if part == "train":
            rows[1] |= changes
        with (root / f"{part}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def egoschema(root: Path, answers: Any = None, **changes: Any) -> None:
    """`changes` go into the second question."""
    records: list[dict[str, Any]] = [
        {
            "q_uid": f"uid-{number}",
            "google_drive_id": "x",
            "question": "What is the goal of C?",
            **{f"option {n}": f"C does {n}" for n in range(5)},
        }
        for number in range(3)
    ]
    records[1] |= changes
    (root / "questions.json").write_text(json.dumps(records))
    (root / "subset_answers.json").write_text(json.dumps({"uid-1": 3} if answers is None else answers))


def load(name: str, root: Path) -> Dataset:
    return load_dataset(DataConfig(name=name, root=root))


def fault(name: str, root: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        load(name, root)
    (line,) = caught.value.problems
    return line.replace(str(root), "ROOT")


def test_qaego4d_loads_as_open_ended_questions(tmp_path: Path) -> None:
    qaego4d(tmp_path)
    dataset = load("qaego4d", tmp_path)
    assert [clip.clip_id for clip in dataset.clips] == ["uid-0", "uid-1", "uid-2"]
    assert dataset.clips[0].video == tmp_path / "clips" / "uid-0.mp4"
    assert (dataset.clips[0].start_s, dataset.clips[0].end_s) == (None, None)
    assert dataset.answers == ("<UNK0>", "<UNK1>", "on the table", "in the drawer")
    assert [question.question_id for question in dataset.questions["val"]] == ["10", "11"]
    assert dataset.choices == 0
    assert dataset.texts == ("Where did I leave the keys?",)


def test_qaego4d_close_loads_as_four_way_multiple_choice(tmp_path: Path) -> None:
    qaego4d(tmp_path)
    dataset = load("qaego4d-close", tmp_path)
    assert dataset.choices == 4
    questions = [question for part in dataset.questions.values() for question in part]
    assert all(question.options[question.answer_index or 0].lower() == question.answer for question in questions)
    assert len({question.answer_index for question in questions}) > 1  # the right one is not always first
    assert load("qaego4d-close", tmp_path) == dataset


def test_nextqa_loads(tmp_path: Path) -> None:
    nextqa(tmp_path)
    dataset = load("nextqa", tmp_path)
    assert [clip.video for clip in dataset.clips] == [
        tmp_path / "NExTVideo" / "1164" / "100.mp4",
        tmp_path / "NExTVideo" / "0007" / "200.mp4",
    ]
    question, other = dataset.questions["test"]
    assert (question.question_id, question.text) == ("100_2", "why did the boy, in red, run in test")
    assert (question.tags, other.tags) == (("causal", "CW"), ("temporal", "TN"))
    assert (question.answer_index, question.answer, dataset.choices) == (2, "option 2", 5)


def test_egoschema_loads_as_a_partly_labelled_test_set(tmp_path: Path) -> None:
    egoschema(tmp_path)
    dataset = load("egoschema", tmp_path)
    assert [len(dataset.questions[part]) for part in PARTS] == [0, 0, 3]  # type: ignore[index]
    assert [question.answer_index for question in dataset.questions["test"]] == [None, 3, None]
    assert dataset.clips[2].video == tmp_path / "videos" / "uid-2.mp4"


def test_duplicate_options_in_a_released_set_are_kept(tmp_path: Path) -> None:
    egoschema(tmp_path, **{"option 4": "C does 0"})
    assert load("egoschema", tmp_path).questions["test"][1].options[4] == "C does 0"


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("qaego4d", {"answer": ""}, "annotations.train.json:record 2: 'answer' is ''; expected text"),
        ("qaego4d", {"sample_id": 0}, "annotations.train.json:record 2: sample_id '0' is used twice"),
        ("qaego4d", {"video_id": "a/b"}, "annotations.train.json:record 2: 'video_id' is 'a/b'; expected a name"),
        ("qaego4d-close", {"wrong_answers": ["one"]}, "record 2: 'wrong_answers' has 1 answer; expected 3"),
        ("nextqa", {"answer": 5}, "train.csv:3: 'answer' is '5'; expected 0 to 4, the index of the right option"),
        ("nextqa", {"video": "300"}, "train.csv:3: 'video' is '300', which map_vid_vidorID.json does not name"),
        ("nextqa", {"type": "XY"}, "train.csv:3: 'type' is 'XY'; expected one that starts with C, T, D"),
        ("nextqa", {"a3": ""}, "train.csv:3: 'a3' is ''; expected text"),
        ("nextqa", {"video": "100"}, "train.csv:3: qid '100_0' is used twice"),
        ("egoschema", {"q_uid": "uid-0", "answers": {}}, "questions.json:record 2: q_uid 'uid-0' is used twice"),
        ("egoschema", {"option 3": None}, "questions.json:record 2: 'option 3' is None; expected text"),
        ("egoschema", {"answers": {"uid-1": 5}}, "record 2: its answer in subset_answers.json is 5; expected 0 to 4"),
        (
            "egoschema",
            {"answers": {"uid-9": 0}},
            "subset_answers.json: has an answer for 'uid-9', which is not a question",
        ),
        ("egoschema", {"answers": [1]}, "subset_answers.json: contains a JSON list; expected an object of indices"),
    ],
)
def test_invalid_record_is_reported_in_one_line(name: str, changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    {"qaego4d": qaego4d, "nextqa": nextqa, "egoschema": egoschema}[name.removesuffix("-close")](tmp_path, **changes)
    line = fault(name, tmp_path)
    assert line.startswith("ROOT/")
    assert why in line


@pytest.mark.parametrize(("name", "file"), [("nextqa", "map_vid_vidorID.json"), ("egoschema", "subset_answers.json")])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"100": "1164/100", "100": "0007/200"}', "key '100' is used twice in one object; expected each key once"),
        ("[" * 100_000, "cannot be parsed as JSON (maximum recursion depth exceeded"),
        ('{"100": ', "line 1 column 9: not valid JSON (Expecting value); the file may be truncated, download it again"),
    ],
)
def test_invalid_json_object_is_refused(name: str, file: str, text: str, why: str, tmp_path: Path) -> None:
    {"nextqa": nextqa, "egoschema": egoschema}[name](tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(DatasetError) as caught:
        load(name, tmp_path)
    first = caught.value.problems[0]
    assert first.startswith(f"{tmp_path / file}:")
    assert why in first


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("qaego4d", "annotations.train.json"),
        ("nextqa", "map_vid_vidorID.json"),
        ("nextqa", "val.csv"),
        ("egoschema", "questions.json"),
        ("egoschema", "subset_answers.json"),
    ],
)
def test_a_missing_file_is_named(name: str, missing: str, tmp_path: Path) -> None:
    {"qaego4d": qaego4d, "nextqa": nextqa, "egoschema": egoschema}[name](tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(DatasetError, match=f"{missing}: no such file; expected "):
        load(name, tmp_path)


def test_missing_csv_columns_are_listed(tmp_path: Path) -> None:
    nextqa(tmp_path)
    (tmp_path / "val.csv").write_text("video,question\n1,2\n")
    assert fault("nextqa", tmp_path).startswith("ROOT/val.csv:1: lacks the columns answer, qid, type, a0")
