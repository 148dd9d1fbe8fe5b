"""Metrics against an independent count, and what a predictions file is refused for."""

import json
import random
from pathlib import Path

import pytest

from extract.datasets import Question
from train.__main__ import main
from train.metrics import PredictionError, read_predictions, score

TAGS = ("world", "intent", "multi-agent", "descriptive", "predictive", "object", "action", "direct", "indirect")


def made_up(n: int = 1000, seed: int = 0) -> tuple[list[Question], dict[str, str]]:
    rng = random.Random(seed)
    questions, answers = [], {}
    for i in range(n):
        form = rng.choice(["open", "binary"])
        answer = rng.choice(["yes", "no"] if form == "binary" else ["cup", "put down fork", "<unk1>"])
        tags = tuple(rng.sample(TAGS, rng.randint(0, 4)))
        questions.append(Question(f"q{i}", f"c{i % 7}", "?", answer, form, tags))
        said = answer if rng.random() < 0.6 else "bowl"
        answers[f"q{i}"] = rng.choice([said, said.upper(), f" {said} "])
    return questions, answers


def test_metrics_agree_with_an_independent_count() -> None:
    questions, answers = made_up()
    metrics = score(questions, answers, "indirect").as_json()

    def count(keep):  # type: ignore[no-untyped-def]
        hits = [answers[q.question_id].strip().lower() == q.answer for q in questions if keep(q)]
        return {"accuracy": pytest.approx(100 * sum(hits) / len(hits)), "n": len(hits)}

    assert metrics["open"] == count(lambda q: q.form == "open")
    assert metrics["binary"] == count(lambda q: q.form == "binary")
    assert metrics["all"] == count(lambda q: True)
    assert metrics["split_tag"] == count(lambda q: "indirect" in q.tags)
    assert metrics["tags"] == {tag: count(lambda q, tag=tag: tag in q.tags) for tag in sorted(TAGS)}
    assert metrics["all"]["n"] == 1000


def test_groups_without_questions_have_no_accuracy() -> None:
    question = Question("1", "c", "?", "yes", "binary", ())
    metrics = score([question], {"1": "YES"}, "direct")
    assert metrics.open.as_json() == {"accuracy": None, "n": 0}
    assert metrics.split_tag is not None
    assert metrics.split_tag.accuracy is None
    assert metrics.binary.accuracy == 100.0
    assert score([question], {"1": "no"}, None).split_tag is None


def test_a_question_without_an_answer_is_refused() -> None:
    questions, answers = made_up(5)
    del answers["q3"]
    with pytest.raises(ValueError, match="1 questions have no answer, such as 'q3'"):
        score(questions, answers, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "p.jsonl:6: not valid JSON"),
        ("[1]", r"p.jsonl:6: holds '\[1\]'; expected an object"),
        ('{"question_id": "q4"}', "p.jsonl:6: 'answer' is missing; expected text"),
        ('{"question_id": "q4", "answer": 3}', "p.jsonl:6: 'answer' is 3; expected text"),
        ('{"question_id": true, "answer": "a"}', "p.jsonl:6: 'question_id' is True; expected text"),
        ('{"question_id": "q0", "answer": "a"}', "p.jsonl:6: question_id 'q0' is answered twice"),
        ('{"question_id": "zz", "answer": "a"}', "p.jsonl:6: question_id 'zz' is no question"),
        ("[" * 100_000, "p.jsonl:6: cannot be parsed as JSON"),
    ],
)
def test_malformed_predictions_are_refused_by_name(tmp_path: Path, line: str, message: str) -> None:
    questions, answers = made_up(5)
    path = tmp_path / "p.jsonl"
    lines = [json.dumps({"question_id": name, "answer": said}) for name, said in answers.items()]
    path.write_text("\n".join([*lines, line, ""]))
    with pytest.raises(PredictionError, match=message):
        read_predictions(path, questions)


def test_missing_ids_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    questions, _ = made_up(30)
    path = tmp_path / "p.jsonl"
    path.write_text("")
    with pytest.raises(PredictionError) as error:
        read_predictions(path, questions)
    lines = str(error.value).splitlines()
    assert "question_id 'q0' has no answer; expected one line each" in lines[0]
    assert len(lines) == 21
    assert lines[-1].endswith("and 10 more")


def test_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r"p\.jsonl: no such file; expected"):
        read_predictions(tmp_path / "p.jsonl", [])


def write_annotations(path: Path, questions: list[Question]) -> None:
    records = [
        {
            "question": q.text,
            "answer": q.answer.title(),
            "question_id": q.question_id,
            "interval": q.clip_id,
            "structural": "verify" if q.form == "binary" else "query",
            "reasoning_type": "$".join(q.tags) or "world",
        }
        for q in questions
    ]
    path.write_text(json.dumps(records))


def test_score_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, answers = made_up(200)
    folder = tmp_path / "qa" / "direct"
    folder.mkdir(parents=True)
    write_annotations(folder / "test.json", questions)
    predictions = tmp_path / "p.jsonl"
    predictions.write_text("".join(json.dumps({"question_id": k, "answer": v}) + "\n" for k, v in answers.items()))
    args = ["score", "--questions", str(folder / "test.json"), "--predictions", str(predictions), "--json"]
    assert main(args) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = score(questions, answers, "direct").as_json()
    for part in ("open", "binary", "all", "split_tag"):
        assert printed[part] == expected[part]
    predictions.write_text(predictions.read_text() + '{"question_id": "q0", "answer": "x"}\n')
    assert main(args) == 1
    assert "question_id 'q0' is answered twice" in capsys.readouterr().err
