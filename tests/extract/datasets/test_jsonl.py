import difflib
import json
import pickle
import tracemalloc
from pathlib import Path

import pytest

from egopatch.configs.schema import DataConfig
from egopatch.extract.__main__ import main
from egopatch.extract.datasets import Clip, Dataset, DatasetError, load_dataset
from egopatch.extract.datasets.jsonl import read_questions
from egopatch.extract.datasets.parsing import json_lines
from egopatch.features import Fingerprint, StoreSpec, create_store

CLIPS = """{"clip_id": "b", "video": "videos/b.mp4", "start_s": 1, "end_s": 2.5}

{"clip_id": "a", "video": "/elsewhere/a.mp4"}
"""
QUESTIONS = """{"question_id": 7, "clip_id": "a", "question": "What?", "answer": "Cup", "part": "train"}
{"question_id": "8", "clip_id": "b", "question": "Open?", "answer": "yes", "part": "val", "tags": ["world"]}
{"question_id": "9", "clip_id": "b", "question": "What?", "answer": "yes", "part": "test", "form": "open"}
"""


def load(root: Path, clips: str | None = CLIPS, questions: str | None = QUESTIONS) -> Dataset:
    for name, text in (("clips.jsonl", clips), ("questions.jsonl", questions)):
        if text is not None:
            (root / name).write_text(text)
    return load_dataset(DataConfig(name="jsonl", root=root))


def faults(root: Path, clips: str | None = CLIPS, questions: str | None = QUESTIONS) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        load(root, clips, questions)
    return [line.replace(str(root), "ROOT") for line in caught.value.problems]


def test_clips_in_a_csv_table_are_refused_with_one_error(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("clip_id,video\na,a.mp4\nb,b.mp4\n")
    with pytest.raises(DatasetError) as caught:
        load_dataset(DataConfig(name="jsonl", root=tmp_path, clips="clips.csv"))
    assert caught.value.problems == (
        f"data.clips is {tmp_path / 'clips.csv'}, which is a table; expected a file with one JSON object per line",
    )


def test_clips_and_questions_load(tmp_path: Path) -> None:
    dataset = load(tmp_path)
    assert dataset.clips == (
        Clip("a", Path("/elsewhere/a.mp4")),
        Clip("b", tmp_path / "videos/b.mp4", 1.0, 2.5),
    )
    assert dataset.answers == ("<UNK0>", "<UNK1>", "cup")
    assert dataset.texts == ("Open?", "What?")
    parts = {part: [(q.question_id, q.form, q.tags) for q in qs] for part, qs in dataset.questions.items()}
    assert parts == {
        "train": [("7", "open", ())],
        "val": [("8", "binary", ("world",))],
        "test": [("9", "open", ())],
    }


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("clips", "questions", "fault"),
    [
        (None, None, "clips.jsonl: no such file; expected the clips, one JSON object per line (data.clips)"),
        (
            CLIPS,
            None,
            "questions.jsonl: no such file; expected the questions, one JSON object per line (data.questions)",
        ),
        (
            CLIPS,
            POINTER,
            "questions.jsonl: is a pointer of Git LFS, not the file itself; run `git lfs pull` to fetch it",
        ),
        ("\n", "", "clips.jsonl: contains no clip; expected one JSON object per line"),
        (CLIPS, "\n", "questions.jsonl: contains no question; expected one per line"),
    ],
)
def test_missing_or_empty_file_is_reported(
    tmp_path: Path, clips: str | None, questions: str | None, fault: str
) -> None:
    assert faults(tmp_path, clips, questions) == [f"ROOT/{fault}"]


def test_status_reads_the_clips_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There may be a million questions, which take twenty seconds to read."""
    spec = StoreSpec.for_patches(frames=1, grid=(1, 1), width=2, dtype="float16")
    create_store(tmp_path / "store", spec, Fingerprint({"arch": "other"}), ["a", "b"])
    options = ["--config", "configs/demo/egovlpv2.yaml", "--data.name", "jsonl", "--data.root", str(tmp_path)]
    (tmp_path / "questions.jsonl").write_text("no question\n")
    for clips, said in ((CLIPS, False), ("no clip\n", True)):
        (tmp_path / "clips.jsonl").write_text(clips)
        assert main(["status", *options, "--store.path", str(tmp_path / "store")]) == 0
        assert ("the annotations cannot be read" in capsys.readouterr().out) == said


def test_byte_order_mark_and_crlf_line_endings_are_accepted(tmp_path: Path) -> None:
    plain = load(tmp_path)
    (tmp_path / "clips.jsonl").write_bytes(b"\xef\xbb\xbf" + CLIPS.replace("\n", "\r\n").encode())
    assert load(tmp_path, None) == plain


def test_utf16_is_reported_once_and_not_for_each_line(tmp_path: Path) -> None:
    (tmp_path / "clips.jsonl").write_text(CLIPS, encoding="utf-16")
    fault = "ROOT/clips.jsonl:1: is UTF-16 text, as some editors save it; save the file as UTF-8"
    assert faults(tmp_path, None) == [fault]


def test_invalid_utf8_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "clips.jsonl").write_bytes(CLIPS.encode() + b'{"clip_id": "\xff"}\n{"clip_id"\n')
    assert faults(tmp_path, None) == [
        "ROOT/clips.jsonl:4: not UTF-8 text (byte 13 of the line); save the file as UTF-8",
        "ROOT/clips.jsonl:5: not valid JSON (Expecting ':' delimiter at column 11); expected one object on the line",
    ]


def test_name_that_no_file_can_have_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"'.*/a\\x00b': no file can have this name; expected the clips"):
        load_dataset(DataConfig("jsonl", tmp_path, clips="a\0b"))


def test_json_lines_are_streamed_with_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"
    path.write_text((json.dumps({"clip_id": "x" * 200}) + "\n") * 10_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_lines(path, "clips")) == 10_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 10


def test_loaded_questions_take_little_memory(tmp_path: Path) -> None:
    """There may be millions, and many are about one clip."""
    asked = {"clip_id": "a", "question": "What is opened?", "answer": "fridge", "part": "train"}
    lines = "".join(json.dumps({"question_id": n, **asked}) + "\n" for n in range(10_000))
    (tmp_path / "questions.jsonl").write_text(lines)
    read_questions(tmp_path / "questions.jsonl")
    tracemalloc.start()
    try:
        questions = read_questions(tmp_path / "questions.jsonl")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / len(questions["train"]) < 340


def test_dataset_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(DatasetError(["a: b", "c: d"])))
    assert (error.problems, str(error)) == (("a: b", "c: d"), "a: b\nc: d")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "contains a list; expected an object"),
        ('{"clip_id": "c"', "not valid JSON (Expecting ',' delimiter at column 16); expected one object on the line"),
        ('{"clip_id": "c", "video": "v", "start": 1}', "unknown key 'start'; did you mean 'start_s'?"),
        ('{"clip_id": "c", "video": "v", "x": 1}', "unknown key 'x'; the keys are clip_id, video, start_s, end_s"),
        ('{"clip_id": "c"}', "'video' is missing; expected text"),
        ('{"clip_id": "", "video": "v"}', "'clip_id' is ''; expected text"),
        (
            '{"clip_id": "/a", "video": "v"}',
            "'clip_id' is '/a'; expected names joined by single slashes, such as P01/",
        ),
        ('{"clip_id": "a/../b", "video": "v"}', "'clip_id' is 'a/../b'; expected names joined by single slashes"),
        ('{"clip_id": "a/", "video": "v"}', "'clip_id' is 'a/'; expected names joined by single slashes"),
        (r'{"clip_id": "a\\b", "video": "v"}', r"'clip_id' is 'a\\b'; expected names joined by single slashes"),
        ('{"clip_id": "c", "video": "v", "start_s": "1"}', "'start_s' is '1'; expected a number of seconds or null"),
        ('{"clip_id": "c", "video": "v", "start_s": NaN}', "'start_s' is nan; expected a number of seconds or null"),
        ('{"clip_id": "c", "video": "v", "end_s": true}', "'end_s' is True; expected a number of seconds or null"),
        ('{"clip_id": "c", "video": "v", "start_s": -1}', "clip 'c': start_s is -1.0; expected seconds"),
        ('{"clip_id": "c", "video": "v", "start_s": 2, "end_s": 2}', "clip 'c': end_s is 2.0; expected more"),
        ('{"clip_id": "a", "video": "v"}', "clip_id 'a' is used twice; expected unique ids"),
        ('{"clip_id": "c", "video": "v", "video": "w"}', "key 'video' is used twice in one object; expected each key"),
        ('{"clip_id": "c", "video": "a\\u0000.mp4"}', r"'video' is 'a\x00.mp4'; expected text without NUL"),
        ('{"clip_id": "c", "video": "' + "v" * 256 + '"}', "'video' has a name of 256 bytes; expected at most 255"),
        ('{"clip_id": "c", "video": "v", "end_s": ' + "9" * 400 + "}", "'end_s' is 99999"),
        ('{"clip_id": "c", "video": "v", "end_s": 1e400}', "'end_s' is inf; expected a number of seconds or null"),
    ],
)
def test_malformed_clip_is_refused_with_its_reason(tmp_path: Path, line: str, reason: str) -> None:
    (fault,) = faults(tmp_path, CLIPS + line)
    assert fault.startswith(f"ROOT/clips.jsonl:4: {reason}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            ('"a"', '"zz"'),
            "clip_id 'zz' is not a clip of ROOT/clips.jsonl, which has ids such as 'b'; correct it, or add the clip "
            "there",
        ),
        (('"train"', '"trian"'), "'part' is 'trian'; expected train, val or test"),
        (('"part": "train"', '"form": "x"'), "'part' is missing; expected train, val or test"),
        (('"train"', '"train", "form": "x"'), "'form' is 'x'; expected open or binary"),
        (('"train"', '"train", "tags": [1]'), "'tags' is [1]; expected a list of strings"),
        (('"train"', '"train", "anser": 1'), "unknown key 'anser'; did you mean 'answer'?"),
        (('"Cup"', "null"), "'answer' is None; expected text"),
        (('"Cup"', "true"), "'answer' is True; expected text"),
        (('"Cup"', "NaN"), "'answer' is nan; expected text"),
        (("7", r'"\ud800"'), r"'question_id' is '\ud800'; expected text without NUL or lone surrogates"),
        (
            ('"train"', r'"train", "tags": ["\udfff"]'),
            r"'tags' is ['\udfff']; expected text without NUL or lone surrogates",
        ),
        (('"train"', '"train", "part": "val"'), "key 'part' is used twice in one object; expected each key once"),
        (("7", '"8"'), None),
    ],
)
def test_malformed_question_is_refused_with_its_reason(
    tmp_path: Path, change: tuple[str, str], reason: str | None
) -> None:
    first, rest = QUESTIONS.split("\n", 1)
    fault = faults(tmp_path, CLIPS, f"{first.replace(*change)}\n{rest}")
    if reason is None:
        assert fault == ["ROOT/questions.jsonl:2: question_id '8' is used twice; expected unique ids"]
    else:
        assert fault == [f"ROOT/questions.jsonl:1: {reason}"]


def test_errors_of_both_files_are_reported_together(tmp_path: Path) -> None:
    lines = faults(tmp_path, CLIPS + "1\n2\n", QUESTIONS + "3\n")
    assert [line.split(" ")[0] for line in lines] == [
        "ROOT/clips.jsonl:4:",
        "ROOT/clips.jsonl:5:",
        "ROOT/questions.jsonl:4:",
    ]


def test_fault_in_a_clip_is_not_reported_as_questions_about_an_unknown_clip(tmp_path: Path) -> None:
    clips = CLIPS.replace('"clip_id": "a",', '"clip_id": "a", "start_s": 9, "end_s": 3,')
    assert clips != CLIPS
    (fault,) = faults(tmp_path, clips, QUESTIONS)
    assert fault.endswith("clip 'a': end_s is 3.0; expected more than start_s, which is 9.0")


CHOICE = {"question_id": 1, "clip_id": "a", "question": "What?", "part": "train"}


def test_unknown_clip_id_error_shows_the_similar_id(tmp_path: Path) -> None:
    clips = '{"clip_id": "caf\u00e9", "video": "a.mp4"}\n'
    for clip_id, shown in (("cafe\u0301", r"cafe\u0301"), ("Caf\u00e9", r"Caf\xe9"), ("caf\u00e9 ", r"caf\xe9 ")):
        question = {"question_id": "1", "clip_id": clip_id, "question": "What?", "answer": "cup", "part": "train"}
        assert faults(tmp_path, clips, json.dumps(question)) == [
            f"ROOT/questions.jsonl:1: clip_id '{shown}' is not a clip of ROOT/clips.jsonl, which has 'caf\\xe9'; "
            "use one spelling in both files"
        ]


def test_unicode_forms_of_an_answer_share_one_class(tmp_path: Path) -> None:
    rows = (
        {"question_id": number, "clip_id": "a", "question": "What?", "answer": answer, "part": part}
        for number, (answer, part) in enumerate((("Caf\u00e9", "train"), ("cafe\u0301", "test")))
    )
    dataset = load(tmp_path, questions="".join(json.dumps(row) + "\n" for row in rows))
    assert dataset.answers == ("<UNK0>", "<UNK1>", "caf\u00e9")
    assert [q.answer for q in dataset.questions["test"]] == ["caf\u00e9"]


def test_multiple_choice_questions_load(tmp_path: Path) -> None:
    line = {**CHOICE, "options": ["Yes", "a  Cup ", "jar"], "answer_index": 1}
    dataset = load(tmp_path, CLIPS, json.dumps(line))
    (question,) = dataset.questions["train"]
    assert question.options == ("Yes", "a  Cup ", "jar")
    assert (question.answer, question.answer_index, question.form) == ("a  cup", 1, "open")
    assert (dataset.choices, dataset.answers) == (3, ("<UNK0>", "<UNK1>"))
    assert dataset.texts == ("What?", "Yes", "a  Cup ", "jar")
    assert load(tmp_path, CLIPS, json.dumps({**line, "answer": "jar", "answer_index": 2})).choices == 3


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"options": ["cup"], "answer_index": 0}, "has 1 option; expected 2 to 26"),
        ({"options": [str(n) for n in range(100)], "answer_index": 0}, "has 100 options; expected 2 to 26"),
        (
            {"options": ["cup", "jar", " CUP"], "answer_index": 0},
            "has the option 'cup' twice; expected each option once",
        ),
        (
            {"options": ["cup", "jar"], "answer_index": 2},
            "'answer_index' is 2; expected 0 to 1, the index of the right",
        ),
        ({"options": ["cup", "jar"], "answer_index": -1}, "'answer_index' is -1; expected 0 to 1"),
        ({"options": ["cup", "jar"], "answer_index": True}, "'answer_index' is True; expected 0 to 1"),
        ({"options": ["cup", "jar"]}, "'answer_index' is None; expected 0 to 1"),
        ({"options": ["cup", ""], "answer_index": 0}, "'options' is ['cup', '']; expected a list of strings"),
        ({"options": ["cup", "jar"], "answer_index": 0, "answer": "jar"}, "'answer' is 'jar', but option 0 is 'cup'"),
        ({"options": [], "answer_index": 0}, "'answer_index' is given without options"),
    ],
)
def test_malformed_options_are_reported_with_their_line(more: dict[str, object], why: str, tmp_path: Path) -> None:
    (fault,) = faults(tmp_path, CLIPS, json.dumps({**CHOICE, **more}))
    assert fault.startswith("ROOT/questions.jsonl:1: ")
    assert why in fault


def test_options_on_only_some_questions_are_refused(tmp_path: Path) -> None:
    lines = [{**CHOICE, "options": ["cup", "jar"], "answer_index": 0}, {**CHOICE, "question_id": 2, "answer": "cup"}]
    assert faults(tmp_path, CLIPS, "\n".join(map(json.dumps, lines))) == [
        "questions without options: 1 of 2, such as '2'; expected options for all questions or none"
    ]


def test_error_message_shows_ten_errors_and_counts_the_rest(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        load(tmp_path, "[]\n" * 2000, "[]\n" * 3)
    lines = str(caught.value).splitlines()
    assert lines[6] == f"{tmp_path}/clips.jsonl:7: contains a list; expected an object"
    assert all(line.startswith(f"{tmp_path}/questions.jsonl:") for line in lines[7:10])
    assert lines[10:] == ["and 1,993 more; `egopatch extract doctor --json --config CONFIG` lists them all"]
    assert len(caught.value.problems) == 2003


def test_error_message_shows_a_rare_error_among_many_equal_ones(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        load(tmp_path, "[]\n" * 20 + '{"clip_id": "c"}\n' + "[]\n" * 20, "[]\n" * 3)
    shown = [line.removeprefix(f"{tmp_path}/clips.jsonl:") for line in str(caught.value).splitlines()]
    assert shown[5:7] == ["6: contains a list; expected an object", "21: 'video' is missing; expected text"]
    assert shown[10].startswith("and 34 more; ")


def test_spelling_suggestion_is_computed_once_per_unknown_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda key, *_, **__: looked_up.append(key) or ["question"])
    found = faults(tmp_path, CLIPS, '{"qestion": 1}\n' * 200)
    assert len(found) == 200
    assert looked_up == ["qestion"]


def test_numeric_answers_and_clip_ids_with_slashes_load(tmp_path: Path) -> None:
    dataset = load(
        tmp_path, CLIPS.replace('"a"', '"P01/P01_01"'), QUESTIONS.replace('"a"', '"P01/P01_01"').replace('"Cup"', "3")
    )
    assert [clip.clip_id for clip in dataset.clips] == ["P01/P01_01", "b"]
    assert dataset.answers == ("<UNK0>", "<UNK1>", "3")
    (question,) = dataset.questions["train"]
    assert (question.clip_id, question.answer, question.form) == ("P01/P01_01", "3", "open")
