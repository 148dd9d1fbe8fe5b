"""Questions in a CSV file, in place of JSON lines."""

import csv
from pathlib import Path

import pytest

from egopatch.configs.schema import DataConfig
from egopatch.extract.datasets import DatasetError, load_dataset
from egopatch.extract.datasets.jsonl import read_questions
from tests.extract.datasets.test_jsonl import CLIPS

TABLE = (
    ("question_id", "clip_id", "question", "answer", "part", "tags", "form"),
    ("7", "a", "What, then?", "Cup", "train", "", ""),
    ("8", "b", "Open?", "yes", "val", "world | room", ""),
    ("9", "b", "What, then?", "3", "test", "", "open"),
)


@pytest.mark.parametrize(("name", "delimiter"), [("q.csv", ","), ("q.csv", ";"), ("q.csv", "\t"), ("q.tsv", "\t")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_questions_load_from_csv_and_tsv(tmp_path: Path, name: str, delimiter: str, encoding: str) -> None:
    (tmp_path / "clips.jsonl").write_text(CLIPS)
    with (tmp_path / name).open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([*TABLE, ("",) * len(TABLE[0])])
    questions = load_dataset(DataConfig(name="jsonl", root=tmp_path, questions=name)).questions
    found = {
        part: [(q.question_id, q.text, q.answer, q.form, q.tags) for q in asked] for part, asked in questions.items()
    }
    assert found == {
        "train": [("7", "What, then?", "cup", "open", ())],
        "val": [("8", "Open?", "yes", "binary", ("world", "room"))],
        "test": [("9", "What, then?", "3", "open", ())],
    }


def test_answer_options_load_from_csv(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text(
        "question_id,clip_id,question,part,options,answer_index\n1,a,What?,train,cup|jar,1\n"
    )
    (question,) = read_questions(tmp_path / "q.csv")["train"]
    assert (question.options, question.answer) == (("cup", "jar"), "jar")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "question_id,clip_id,question\n",
            ":1: lacks the columns part; expected question_id, clip_id, question, part; "
            "found 'question_id', 'clip_id', 'question'",
        ),
        (
            'question_id,clip_id,question,answer,part\n1,a,"What,cup,train\n2,a,W?,cup,train\n',
            ":2: not valid CSV (unexpected end of data); expected the questions, CSV in UTF-8 with a header"
            " (data.questions), and quotation marks inside quoted cells doubled",
        ),
        (
            'question_id,clip_id,question,answer,part\n\n1,a,"hi" is said by,cup,train\n',
            ":3: not valid CSV (',' expected after '\"'); expected the questions",
        ),
        (
            'question_id,clip_id,question,answer,part\n1,a,"What\nis it?",cup,trian\n',
            ":2: 'part' is 'trian'; expected train, val or test",
        ),
        (
            "question_id,clip_id,question,part,anser\n1,a,What?,train,cup\n",
            ":2: unknown key 'anser'; did you mean 'answer'?",
        ),
        (
            "question_id,clip_id,question,answer,part\n1,a,What?,a,cup,train\n",
            ":2: has more cells than the header, which has 5",
        ),
        ("question_id,clip_id,question,answer,part\n1,a,What?,,train\n", ":2: 'answer' is missing; expected text"),
        ("question_id,clip_id,question,answer,part\n1,a,What?,cup\n", ":2: 'part' is missing; expected train, val or"),
        (
            "question_id,clip_id,question,part,options,answer_index\n1,a,W?,val,a|b,x\n",
            ":2: 'answer_index' is 'x'; expected 0",
        ),
        ("question_id,clip_id,question,answer,part\n", ": contains no question; expected one per line"),
        (
            "question_id,clip_id,question,answer,part,answer\n1,a,What?,cup,train,jar\n",
            ":1: column 'answer' is used twice; expected each column once in the header",
        ),
        (
            ",question_id,clip_id,question,answer,part\n0,1,a,What?,cup,train\n1,2,a,Why?,cup,train\n",
            ":1: column 1 has no name, but line 2 has '0' there; name the column, or remove it (with pandas: ",
        ),
    ],
)
def test_malformed_csv_is_refused_with_its_reason(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(DatasetError) as caught:
        read_questions(tmp_path / "q.csv")
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path / 'q.csv'}{fault}")
