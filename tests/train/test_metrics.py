"""Metrics against an independent count, and the faults for which a predictions file is refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from egopatch.extract.datasets import Question
from egopatch.train.__main__ import main
from egopatch.train.scores.metrics import PredictionError, Score, read_predictions, score

TAGS = ("world", "intent", "multi-agent", "descriptive", "predictive", "object", "action", "direct", "indirect")


def made_up(n: int = 1000, seed: int = 0) -> tuple[list[Question], dict[str, str]]:
    rng = random.Random(seed)
    questions, answers = [], {}
    for i in range(n):
        form = rng.choice(["open", "binary"])
        answer = rng.choice(["yes", "no"] if form == "binary" else ["cup", "put down fork", "<unk1>"])
        tags = tuple(rng.sample(TAGS, rng.randint(0, 4)))
        questions.append(Question(f"q{i}", f"c{i % 7}", "?", answer, form, tags))
        given = answer if rng.random() < 0.6 else "bowl"
        answers[f"q{i}"] = rng.choice([given, given.upper(), f" {given} "])
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


def test_answers_of_the_wrong_form_are_counted() -> None:
    questions, answers = made_up()
    forms = {q.question_id: q.form for q in questions}
    independent = sum((a.strip().lower() in ("yes", "no")) != (forms[q] == "binary") for q, a in answers.items())
    assert independent > 100
    assert score(questions, answers, None).wrong_form == independent
    # An answer that open questions share belongs to neither form.
    either = Question("o", "c", "is it red or no colour?", "no", "open", ())
    assert score([either, questions[0]], {"o": "no", "q0": questions[0].answer}, None).wrong_form == 0


def test_groups_without_questions_have_no_accuracy() -> None:
    question = Question("1", "c", "?", "yes", "binary", ())
    metrics = score([question], {"1": "YES"}, "direct")
    assert metrics.open == Score(None, 0)
    assert metrics.split_tag is not None
    assert metrics.split_tag.accuracy is None
    assert metrics.binary.accuracy == 100.0
    assert score([question], {"1": "no"}, None).split_tag is None


def test_a_question_without_an_answer_is_refused() -> None:
    questions, answers = made_up(5)
    del answers["q3"]
    with pytest.raises(ValueError, match="1 question has no answer, such as 'q3'"):
        score(questions, answers, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "p.jsonl:6: not valid JSON"),
        ("[1]", "p.jsonl:6: contains a list; expected an object"),
        ('{"question_id": "q4"}', "p.jsonl:6: 'answer' is missing; expected text"),
        ('{"question_id": "q4", "answer": true}', "p.jsonl:6: 'answer' is True; expected text"),
        ('{"question_id": true, "answer": "a"}', "p.jsonl:6: 'question_id' is True; expected a string"),
        ('{"question_id": "q4", "answer": "a", "answer": "b"}', "p.jsonl:6: key 'answer' is used twice in one object"),
        ('{"question_id": "q4", "answer": "\\ud800"}', "p.jsonl:6: 'answer' is .* expected text without NUL"),
        ('{"question_id": "q0", "answer": "a"}', "p.jsonl:6: question_id 'q0' is answered twice"),
        ('{"question_id": "zz", "answer": "a"}', "p.jsonl:6: question_id 'zz' is not in the questions file"),
        ("[" * 100_000, "p.jsonl:6: cannot be parsed as JSON"),
    ],
)
def test_malformed_predictions_are_refused_by_line_number(tmp_path: Path, line: str, message: str) -> None:
    questions, answers = made_up(5)
    path = tmp_path / "p.jsonl"
    lines = [json.dumps({"question_id": name, "answer": given}) for name, given in answers.items()]
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
    assert "question_id 'q0' has no answer; expected one line per question" in lines[0]
    assert len(lines) == 21
    assert lines[-1].endswith("and 10 more")


@pytest.mark.parametrize(("kept", "absent"), [(30, 0), (29, 30)])
def test_missing_ids_are_left_out_if_malformed_lines_may_be_theirs(tmp_path: Path, kept: int, absent: int) -> None:
    questions, _ = made_up(30)
    path = tmp_path / "p.jsonl"
    path.write_text("a,b\n" * kept)
    with pytest.raises(PredictionError) as error:
        read_predictions(path, questions)
    assert str(error.value).endswith(f"{path}: and {kept + absent - 20} more")
    assert ("has no answer" in str(error.value)) == bool(absent)


def test_answers_to_other_questions_are_refused_in_one_line(tmp_path: Path) -> None:
    questions, answers = made_up(30)
    path = tmp_path / "p.jsonl"
    names = [*[f"x{number}" for number in range(10)], *list(answers)[:9]]
    path.write_text("".join(json.dumps({"question_id": name, "answer": "a"}) + "\n" for name in names))
    with pytest.raises(PredictionError) as error:
        read_predictions(path, questions)
    assert str(error.value) == (
        f"{path}: 10 of 19 answers belong to other questions, such as question_id 'x0', 'x1', 'x2', and 21 of 30 "
        "questions have no answer, such as 'q9', 'q10', 'q11'; use answers and questions of the same data set, split "
        "and part"
    )


def test_a_missing_predictions_file_gives_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r"p\.jsonl: no such file; expected"):
        read_predictions(tmp_path / "p.jsonl", [])


TYPES = ("world", "intent", "multi-agent")
CATEGORIES = ("descriptive", "predictive", "counterfactual", "explanatory")
OPEN_ANSWERS = ("cup", "Cup", "put down fork", "Open Fridge", "watermelon", "a rare Thing", "  bowl ")


def made_up_release(folder: Path, n: int = 1000, seed: int = 1, raw: bool = False) -> list[dict[str, Any]]:
    """Files with the published fields: capital letters, answers that training never saw, several types at once."""
    rng = random.Random(seed)
    records: dict[str, list[dict[str, Any]]] = {}
    for part, count in (("train", 300), ("test", n)):
        records[part] = []
        for number in range(count):
            structural = rng.choice(["query", "verify"])
            known = OPEN_ANSWERS[:4] if part == "train" else OPEN_ANSWERS
            record: dict[str, Any] = {
                "question": "What is it?",
                "answer": rng.choice(("yes", "no", "Yes") if structural == "verify" else known),
                "question_id": number,
                "video_id": number % 7,
                "interval": f"L{number % 7}-F1|P1|{number}|{number + 95}",
                "type": rng.sample(TYPES, rng.randint(1, 3)),
                "category": rng.sample(CATEGORIES, rng.randint(1, 2)),
                "semantic": rng.choice(["object", "action"]),
                "structural": structural,
                "reference": rng.choice(["direct", "indirect"]),
            }
            joined = [*record["type"], *record["category"]]
            joined += [record["semantic"], record["structural"], record["reference"]]
            records[part].append({**record, "reasoning_type": "$".join(joined)})
    folder.mkdir(parents=True)
    # The published preprocessing, written out: classes are lower-cased, and looked up as spelled in val and test.
    answers = ["<UNK0>", "<UNK1>"]
    for record in records["train"]:
        if record["answer"].lower() not in answers:
            answers.append(record["answer"].lower())
    for part, members in records.items():
        for record in members:
            known = record["answer"].lower() in answers if part == "train" else record["answer"] in answers
            record["answer_encode"] = answers.index(record["answer"].lower()) if known else 1
        hidden = ("answer_encode", "reasoning_type") if raw else ()
        kept_fields = [{key: value for key, value in record.items() if key not in hidden} for record in members]
        name = f"{part}_qas.json" if raw else f"formatted_{part}_qas_encode.json"
        (folder / name).write_text(json.dumps(kept_fields))
    if not raw:
        (folder / "answer_set.txt").write_text("".join(f"{answer}\n" for answer in answers))
    return records["test"]


def write_predictions(path: Path, records: list[dict[str, Any]], seed: int = 2) -> dict[int, str]:
    """Half of them right; spelled in lower case (as the published systems do), as annotated, or odd."""
    rng = random.Random(seed)
    given = {}
    for record in records:
        answer = (
            record["answer"].strip() if rng.random() < 0.5 else rng.choice(["cup", "yes", "no", "<UNK1>", "elephant"])
        )
        given[record["question_id"]] = rng.choice([answer.lower(), answer.lower(), answer, f" {answer.upper()} "])
    path.write_text("".join(json.dumps({"question_id": k, "answer": v}) + "\n" for k, v in given.items()))
    return given


def counted(records: list[dict[str, Any]], right: Callable[[dict[str, Any]], bool], split: str) -> dict[str, Any]:
    """The figures, counted from the file's own fields."""

    def share(keep: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        hits = [right(record) for record in records if keep(record)]
        return {"accuracy": pytest.approx(100 * sum(hits) / len(hits)), "n": len(hits)}

    tags = {tag for record in records for tag in record["reasoning_type"].split("$")}
    return {
        "open": share(lambda r: r["structural"] == "query"),
        "binary": share(lambda r: r["structural"] == "verify"),
        "all": share(lambda r: True),
        "split_tag": share(lambda r: r["reference"] == split),
        "tags": {tag: share(lambda r, tag=tag: tag in r["reasoning_type"].split("$")) for tag in tags},  # type: ignore[misc]
    }


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("split", ["direct", "indirect"])
def test_score_agrees_with_counting_in_files_of_1000_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, raw: bool
) -> None:
    folder = tmp_path / "qa" / split
    records = made_up_release(folder, raw=raw)
    given = write_predictions(tmp_path / "p.jsonl", records)
    name = "test_qas.json" if raw else "formatted_test_qas_encode.json"
    args = ["score", "--questions", str(folder / name), "--predictions", str(tmp_path / "p.jsonl")]

    def lower_cased(record: dict[str, Any]) -> bool:
        return given[record["question_id"]].strip().lower() == record["answer"].strip().lower()

    def released(record: dict[str, Any]) -> bool:
        expected = "<UNK1>" if record["answer_encode"] == 1 else record["answer"].lower()
        return given[record["question_id"]].strip() == expected

    assert main([*args, "--json"]) == 0
    out, note = capsys.readouterr()
    printed = json.loads(out)
    assert printed == counted(records, lower_cased, split)
    assert list(printed) == ["open", "binary", "all", "split_tag", "tags"]
    assert printed["all"]["n"] == 1000

    assert main([*args, "--json", "--compare", "released"]) == 0
    as_released = json.loads(capsys.readouterr().out)
    assert as_released == counted(records, released, split)
    assert 0 < as_released["all"]["accuracy"] < printed["all"]["accuracy"]
    change = as_released["all"]["accuracy"] - printed["all"]["accuracy"]
    assert f"all {as_released['all']['accuracy']:.2f} ({change:+.2f})" in note

    assert main(args) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("all  "))
    figures = [f"{printed['all']['accuracy']:.2f}", f"{as_released['all']['accuracy']:.2f}", f"{change:+.2f}"]
    assert line.split() == ["all", *figures, "n", "1000"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("direct/t.json", "direct"),
        ("x/test_indirect.json", "indirect"),
        ("x/t.json", None),
        ("x/redirected.json", None),
    ],
)
def test_the_split_is_inferred_from_the_folder_or_file_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, split: str | None
) -> None:
    records = made_up_release(tmp_path / "made", n=20)
    write_predictions(tmp_path / "p.jsonl", records)
    (tmp_path / name).parent.mkdir()
    (tmp_path / "made/formatted_test_qas_encode.json").rename(tmp_path / name)
    args = ["score", "--questions", str(tmp_path / name), "--predictions", str(tmp_path / "p.jsonl"), "--json"]
    assert main(args) == 0
    counted_on = json.loads(capsys.readouterr().out)["split_tag"]
    expected = None if split is None else sum(record["reference"] == split for record in records)
    assert (None if counted_on is None else counted_on["n"]) == expected


def test_the_released_matching_rule_needs_an_answer_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "qa" / "direct"
    records = made_up_release(folder, n=20, raw=True)
    write_predictions(tmp_path / "p.jsonl", records)
    (folder / "train_qas.json").unlink()
    args = ["score", "--questions", str(folder / "test_qas.json"), "--predictions", str(tmp_path / "p.jsonl"), "--json"]
    assert main(args) == 0
    out, note = capsys.readouterr()
    assert json.loads(out)["all"]["n"] == 20
    assert "no scores under the released matching rule" in note
    assert main([*args, "--compare", "released"]) == 2
    assert "has neither answer_set.txt nor training questions" in capsys.readouterr().err


def test_custom_questions_are_scored_by_part_and_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(number: int, answer: str, part: str, **more: Any) -> str:
        fields = {"question_id": number, "clip_id": "c", "question": "?", "answer": answer, "part": part, **more}
        return json.dumps(fields) + "\n"

    questions = tmp_path / "questions.jsonl"
    lines = [line(1, "cup", "train"), line(2, "Cup", "test", tags=["a", "b"]), line(3, "no", "test", tags=["b"])]
    questions.write_text("".join([*lines, line(4, "cup", "val")]))
    predictions = tmp_path / "p.jsonl"
    predictions.write_text('{"question_id": 2, "answer": "cup"}\n{"question_id": "3", "answer": "yes"}\n')
    args = ["score", "--questions", str(questions), "--predictions", str(predictions), "--json"]
    assert main(args) == 0
    right, wrong = {"accuracy": 100.0, "n": 1}, {"accuracy": 0.0, "n": 1}
    tags = {"a": right, "b": {"accuracy": 50.0, "n": 2}}
    expected = {"open": right, "binary": wrong, "all": tags["b"], "split_tag": None, "tags": tags}
    assert json.loads(capsys.readouterr().out) == expected
    assert main([*args, "--compare", "released"]) == 0
    assert json.loads(capsys.readouterr().out)["open"] == wrong  # "Cup" is not in the answer set
    assert main([*args, "--split", "b"]) == 0
    assert json.loads(capsys.readouterr().out)["split_tag"] == tags["b"]
    questions.write_text("".join(lines[1:]))
    assert main([*args, "--compare", "released"]) == 2
    assert f"{questions} has no questions of part train; add some, or omit" in capsys.readouterr().err
    questions.write_text("".join([*lines, line(4, "cup", "val")]))
    assert main([*args, "--part", "val"]) == 1
    error = capsys.readouterr().err
    assert "2 of 2 answers belong to other questions, such as question_id '2', '3', and 1 of 1 question has" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "question_id '0' has no answer"),
        (lambda lines: [*lines, lines[5]], "question_id '5' is answered twice"),
        (lambda lines: [*lines, '{"question_id": 9999, "answer": "x"}'], "question_id '9999' is not in the questions"),
        (lambda lines: [*lines[:7], lines[7][:-3], *lines[8:]], "p.jsonl:8: not valid JSON"),
    ],
)
def test_score_command_names_faulty_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[list[str]], list[str]], message: str
) -> None:
    records = made_up_release(tmp_path / "direct", n=50)
    predictions = tmp_path / "p.jsonl"
    write_predictions(predictions, records)
    predictions.write_text("\n".join(change(predictions.read_text().splitlines())))
    questions = tmp_path / "direct/formatted_test_qas_encode.json"
    assert main(["score", "--questions", str(questions), "--predictions", str(predictions), "--json"]) == 1
    out, error = capsys.readouterr()
    assert message in error
    assert out == ""
    assert "Traceback" not in error


def test_score_command_gives_each_fault_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = made_up_release(tmp_path / "direct", n=50)
    predictions = tmp_path / "p.jsonl"
    write_predictions(predictions, records)
    predictions.write_text("".join(predictions.read_text().splitlines(keepends=True)[3:]))
    questions = tmp_path / "direct/formatted_test_qas_encode.json"
    assert main(["score", "--questions", str(questions), "--predictions", str(predictions)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"train score: failed: {predictions}: question_id '0' has no answer")
    assert [line.startswith(f"{predictions}: question_id '{row}' has") for row, line in enumerate(lines[1:], 1)] == [
        True,
        True,
    ]


@pytest.mark.parametrize("answers", ["p.jsonl", "p.json"])
def test_score_says_that_questions_and_predictions_are_swapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answers: str
) -> None:
    records = made_up_release(tmp_path / "direct", n=50)
    predictions = tmp_path / answers
    write_predictions(predictions, records)
    questions = tmp_path / "direct/formatted_test_qas_encode.json"
    assert main(["score", "--questions", str(predictions), "--predictions", str(questions)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"train score: error: --questions is {predictions}, whose lines are answers without a question; expected the "
        "file of the questions there, and the answers in --predictions: swap the two if they are the wrong way round"
    ]


def test_score_refuses_the_questions_as_their_own_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": "q0", "part": "test", "question": "where?", "answer": "sink"}\n')
    args = ["score", "--questions", str(tmp_path / "q.jsonl"), "--predictions", str(tmp_path / "." / "q.jsonl")]
    assert main(args) == 2
    assert "whose answers would all be right; expected a system's answers" in capsys.readouterr().err


def test_score_refuses_malformed_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.json").write_text('[{"question_id": 1}]')
    (tmp_path / "p.jsonl").write_text("")
    args = ["score", "--questions", str(tmp_path / "q.json"), "--predictions", str(tmp_path / "p.jsonl")]
    assert main(args) == 2
    assert "q.json:record 1: 'structural' is missing" in capsys.readouterr().err
