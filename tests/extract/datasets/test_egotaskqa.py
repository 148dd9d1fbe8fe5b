import json
from pathlib import Path
from typing import Any

import pytest

from egopatch.configs.schema import DataConfig
from egopatch.extract.datasets import Dataset, DatasetError, load_dataset
from egopatch.extract.datasets.egotaskqa import read_answers, read_questions
from egopatch.extract.datasets.records import answer_vocabulary

RECORD = {
    "question": "What does the person do?",
    "answer": "Open Fridge",
    "answer_encode": 2,
    "question_id": 0,
    "video_id": 3,
    "interval": "k1|P1|10|95",
    "type": ["world", "intent"],
    "category": ["descriptive"],
    "semantic": "action",
    "structural": "query",
    "reference": "direct",
    "reasoning_type": "world$intent$descriptive$action$query$direct",
}
VERIFY = {**RECORD, "question_id": 1, "question": "Is it open?", "answer": "yes", "answer_encode": 3}
VERIFY |= {"structural": "verify", "reasoning_type": "world$verify", "interval": "k2|P2|0|40"}


def write(path: Path, records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return path


def released(root: Path, split: str = "direct", folder: str = "qa", name: str = "formatted_{}_qas_encode.json") -> Path:
    for part in ("train", "val", "test"):
        write(root / folder / split / name.format(part), [RECORD, VERIFY])
    write(root / folder / split / "answer_set.txt", "<UNK0>\n<UNK1>\nopen fridge\nyes\n")
    return root


def load(root: Path, split: str = "direct") -> Dataset:
    return load_dataset(DataConfig(root=root, split=split))  # type: ignore[arg-type]


def faults(root: Path, split: str = "direct") -> list[str]:
    with pytest.raises(DatasetError) as caught:
        load(root, split)
    assert str(caught.value).splitlines()[:10] == list(caught.value.problems[:10])
    return [line.replace(str(root), "ROOT") for line in caught.value.problems]


def test_released_layout_loads(tmp_path: Path) -> None:
    dataset = load(released(tmp_path))
    assert [clip.clip_id for clip in dataset.clips] == ["k1|P1|10|95", "k2|P2|0|40"]
    assert dataset.clips[0].video == tmp_path / "qa_videos" / "k1|P1|10|95.mp4"
    assert dataset.answers == ("<UNK0>", "<UNK1>", "open fridge", "yes")
    first, second = dataset.questions["train"]
    assert (first.question_id, first.answer, first.form, first.encoded) == ("0", "open fridge", "open", 2)
    assert first.tags == ("world", "intent", "descriptive", "action", "query", "direct")
    assert second.form == "binary"
    assert dataset.texts == ("Is it open?", "What does the person do?")
    assert [dataset.class_of(answer) for answer in ("Open Fridge ", "no")] == [2, 1]


@pytest.mark.parametrize("name", ["formatted_{}_qas_encode.json", "{}_qas_encode.json", "{}_qas.json"])
@pytest.mark.parametrize("folder", ["qa", "qa_ori", "Data/qa", "Data/qa_ori"])
def test_folder_and_file_name_variants_load(tmp_path: Path, folder: str, name: str) -> None:
    assert load(released(tmp_path, folder=folder, name=name)).questions["test"][0].question_id == "0"


def test_encode4_files_provide_training_paraphrases(tmp_path: Path) -> None:
    encode4 = "formatted_{}_qas_encode4.json"
    released(tmp_path)
    folder = tmp_path / "qa_ori" / "direct"
    more = [{**record, "text_pos": f"pos {n}", "text_neg": f"neg {n}"} for n, record in enumerate((RECORD, VERIFY))]
    for part in ("train", "val", "test"):
        write(folder / encode4.format(part), more)
    write(folder / "answer_set.txt", "<UNK0>\n<UNK1>\nopen fridge\nyes\n")
    plain = load(tmp_path)
    assert {q.variants for questions in plain.questions.values() for q in questions} == {None}
    dataset = load_dataset(DataConfig(root=tmp_path, paraphrases=True))
    assert [q.variants for q in dataset.questions["train"]] == [("pos 0", "neg 0"), ("pos 1", "neg 1")]
    assert {q.variants for part in ("val", "test") for q in dataset.questions[part]} == {None}
    assert dataset.texts == (*plain.texts, "neg 0", "neg 1", "pos 0", "pos 1")
    # Alone, they are read like the others.
    assert load(released(tmp_path / "alone", name=encode4)).questions["test"][0].question_id == "0"


def test_missing_paraphrases_are_refused(tmp_path: Path) -> None:
    released(tmp_path)
    train = tmp_path / "qa/direct/formatted_train_qas_encode.json"
    with pytest.raises(DatasetError, match="no record has 'text_pos' and 'text_neg', which data"):
        load_dataset(DataConfig(root=tmp_path, paraphrases=True))
    write(train, [{**RECORD, "text_pos": "a", "text_neg": "b"}, {**VERIFY, "text_pos": "a"}])
    with pytest.raises(DatasetError, match="record 2: 'text_neg' is missing"):
        load_dataset(DataConfig(root=tmp_path, paraphrases=True))
    load(tmp_path)


def test_dataset_includes_clips_and_texts_of_the_other_split(tmp_path: Path) -> None:
    released(tmp_path)
    other = {**RECORD, "interval": "k9|P1|0|5", "question": "Why?"}
    write(tmp_path / "qa/indirect/formatted_test_qas_encode.json", [other])
    dataset = load(tmp_path)
    assert "k9|P1|0|5" in [clip.clip_id for clip in dataset.clips]
    assert "Why?" in dataset.texts
    assert all(question.text != "Why?" for part in dataset.questions.values() for question in part)


def test_raw_files_without_encoded_answers_and_tags_load(tmp_path: Path) -> None:
    raw = {k: v for k, v in RECORD.items() if k not in ("answer_encode", "reasoning_type")}
    answers = ["cup", "Cup", "Cup", "no", "no", "no"]
    records = [{**raw, "question_id": i, "answer": answer} for i, answer in enumerate(answers)]
    for part in ("train", "val", "test"):
        write(tmp_path / f"qa/direct/{part}_qas.json", records)
    dataset = load(tmp_path)
    assert dataset.answers == ("<UNK0>", "<UNK1>", "no", "cup")
    assert dataset.questions["val"][0].tags == ("world", "intent", "descriptive", "action", "query", "direct")
    assert dataset.questions["val"][0].encoded is None
    assert [question.spelling for question in dataset.questions["val"]] == answers


def test_answer_vocabulary_keeps_the_most_frequent() -> None:
    assert answer_vocabulary(["b", "A", "A", "c"], limit=2) == ("<UNK0>", "<UNK1>", "a", "b")
    # As released: frequencies are counted before lower-casing, ties keep the order of first appearance.
    assert answer_vocabulary(["a", "A", "b", "b", "c"]) == ("<UNK0>", "<UNK1>", "b", "a", "c")
    assert len(answer_vocabulary([str(number) for number in range(5000)])) == 4002


def test_read_answers_falls_back_to_the_training_file(tmp_path: Path) -> None:
    released(tmp_path)
    folder = tmp_path / "qa/direct"
    assert read_answers(folder) == ("<UNK0>", "<UNK1>", "open fridge", "yes")
    (folder / "answer_set.txt").write_text("<UNK1>\nno\n")
    assert read_answers(folder) == ("<UNK1>", "no")
    (folder / "answer_set.txt").unlink()
    assert read_answers(folder) == ("<UNK0>", "<UNK1>", "open fridge", "yes")  # built from the training file
    (folder / "formatted_train_qas_encode.json").unlink()
    assert read_answers(folder) is None


def test_encoded_answer_may_be_a_numeric_string(tmp_path: Path) -> None:
    path = write(tmp_path / "train_qas_encode.json", [{**RECORD, "answer_encode": "2"}])
    assert read_questions(path)[0].encoded == 2


def test_empty_data_root_error_lists_each_missing_file(tmp_path: Path) -> None:
    lines = faults(tmp_path, "indirect")
    assert len(lines) == 3
    assert lines[1] == (
        "ROOT/qa/indirect/formatted_val_qas_encode.json: no such file; expected EgoTaskQA's val questions of the "
        "indirect split there (or val_qas_encode.json, val_qas.json, or in qa_ori/, Data/qa/, Data/qa_ori/); "
        "check data.root, which is 'ROOT' (egopatch extract data downloads EgoTaskQA)"
    )


def test_truncated_json_names_line_and_column(tmp_path: Path) -> None:
    released(tmp_path)
    text = json.dumps([RECORD, VERIFY], indent=1)
    write(tmp_path / "qa/direct/formatted_val_qas_encode.json", text[: len(text) // 2])
    (line,) = faults(tmp_path)
    assert line.startswith("ROOT/qa/direct/formatted_val_qas_encode.json:line 1")
    assert "not valid JSON" in line
    assert line.endswith("the file may be truncated, download it again")


def test_every_malformed_record_of_every_file_is_listed(tmp_path: Path) -> None:
    released(tmp_path)
    without = {key: value for key, value in RECORD.items() if key != "question"}
    bad = [
        RECORD,
        "text",
        without,
        {**RECORD, "question_id": 2, "answer": " "},
        {**RECORD, "question_id": 3, "structural": "guess"},
        {**RECORD, "question_id": 4, "interval": "../../etc"},
        {**RECORD, "question_id": 5, "interval": "a" * 300},
        {**RECORD, "question_id": 6, "answer_encode": -1},
        {**RECORD, "question_id": [7]},
        {**RECORD, "question_id": 8, "reasoning_type": None},
        {**RECORD, "question_id": 9, "question": "\ud800?"},
        RECORD,
        {**RECORD, "question_id": "a\ud800"},
        {**RECORD, "question_id": 10, "reasoning_type": "a\0$b"},
    ]
    write(tmp_path / "qa/direct/formatted_train_qas_encode.json", bad)
    write(tmp_path / "qa/direct/formatted_test_qas_encode.json", {"not": "a list"})
    file = "ROOT/qa/direct/formatted_train_qas_encode.json"
    assert faults(tmp_path) == [
        f"{file}:record 2: contains a string; expected an object",
        f"{file}:record 3: 'question' is missing; expected text",
        f"{file}:record 4: 'answer' is ' '; expected text",
        f"{file}:record 5: 'structural' is 'guess'; expected 'query' or 'verify'",
        f"{file}:record 6: 'interval' is '../../etc'; expected a name without slashes or control characters",
        f"{file}:record 7: 'interval' has 300 bytes; expected at most 240",
        f"{file}:record 8: 'answer_encode' is -1; expected a class, a whole number from 0",
        f"{file}:record 9: 'question_id' is [7]; expected a string or a whole number",
        f"{file}:record 10: 'reasoning_type' is None; expected text",
        f"{file}:record 11: 'question' is '\\ud800?'; expected text without NUL or lone surrogates",
        f"{file}:record 12: question_id '0' is used twice; expected unique ids",
        f"{file}:record 13: 'question_id' is 'a\\ud800'; expected text without NUL or lone surrogates",
        f"{file}:record 14: 'reasoning_type' is 'a\\x00$b'; expected text without NUL or lone surrogates",
        "ROOT/qa/direct/formatted_test_qas_encode.json: contains a JSON object; expected a list of question records",
    ]


TWICE = json.dumps(RECORD).replace('"answer":', '"answer": "Close Fridge", "answer":')


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            f"[{json.dumps(VERIFY)}, {TWICE}]",
            ":record 2: key 'answer' is used twice in one object; expected each key once",
        ),
        ([], ": contains no question; expected a list of question records"),
        (
            [RECORD, {**VERIFY, "answer_encode": 4}],
            ":record 2: 'answer_encode' is 4; expected 0 to 3, the classes of the answer set",
        ),
    ],
)
def test_invalid_file_is_refused_with_its_reason(tmp_path: Path, content: Any, fault: str) -> None:
    file = "qa/direct/formatted_val_qas_encode.json"
    write(released(tmp_path) / file, content)
    assert faults(tmp_path) == [f"ROOT/{file}{fault}"]


def test_capitalised_answer_set_is_matched_case_insensitively(tmp_path: Path) -> None:
    write(released(tmp_path) / "qa/direct/answer_set.txt", "<UNK0>\n<UNK1>\nOpen Fridge\nYes\n")
    dataset = load(tmp_path)
    assert dataset.answers == ("<UNK0>", "<UNK1>", "open fridge", "yes")
    assert [dataset.class_of(question.answer) for question in dataset.questions["train"]] == [2, 3]


def test_malformed_answer_set_is_refused(tmp_path: Path) -> None:
    write(released(tmp_path) / "qa/direct/answer_set.txt", "yes\nno\nyes\n")
    assert faults(tmp_path) == [
        "ROOT/qa/direct/answer_set.txt:3: answer 'yes' is also on line 1; expected each answer once",
        "ROOT/qa/direct/answer_set.txt:1: the line <UNK1> is missing; expected the released answer set, "
        "which starts with it",
    ]


def test_non_utf8_file_and_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "train_qas.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DatasetError, match=r"train_qas.json:byte 2: not UTF-8 text; expected an EgoTaskQA annotation"):
        read_questions(path)
    with pytest.raises(DatasetError, match=r"cannot be read .Is a directory.; expected an EgoTaskQA annotation file"):
        read_questions(tmp_path)


def test_oversized_numbers_and_deep_nesting_are_refused(tmp_path: Path) -> None:
    for text in ("[" + "9" * 5000 + "]", "[" * 100000):
        with pytest.raises(DatasetError, match=r"train_qas.json: cannot be parsed as JSON"):
            read_questions(write(tmp_path / "train_qas.json", text))
