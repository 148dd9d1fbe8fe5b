"""BLEU, METEOR and ROUGE of answers, by libraries, and what is said where a library or its data are missing."""

import json
import sys
from pathlib import Path

import nltk.corpus
import pytest

from egopatch.extract.datasets import Question
from egopatch.train.__main__ import main
from egopatch.train.scores.text_metrics import TextMetricsError, text_metrics
from tests.extract.datasets.test_released import qaego4d

ANSWERS = {"1": "on the table in the kitchen", "2": "in the drawer", "3": "yes"}
QUESTIONS = [Question(name, "clip", "where?", answer, "open", ()) for name, answer in ANSWERS.items()]


class _NoSynonyms:
    """WordNet as if it knew no word: METEOR then matches words and their stems."""

    def ensure_loaded(self) -> None:
        pass

    def synsets(self, word: str) -> list[object]:
        return []


class _Absent:
    def ensure_loaded(self) -> None:
        raise LookupError


@pytest.fixture
def no_synonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.corpus, "wordnet", _NoSynonyms())


@pytest.mark.usefixtures("no_synonyms")
def test_equal_answers_and_others() -> None:
    best = text_metrics(QUESTIONS, {name: f" {answer.upper()} " for name, answer in ANSWERS.items()})
    assert best["exact_match"] == best["rouge_l"] == 100
    assert best["bleu_4"] == pytest.approx(100)
    assert best["meteor"] > 80  # one chunk of one word is penalised
    given = {"1": "on the table in the garden", "2": "in the drawers", "3": "no"}
    some = text_metrics(QUESTIONS, given)
    assert some["exact_match"] == 0
    assert some["rouge_l"] == pytest.approx(100 * (5 / 6 + 2 / 3 + 0) / 3)
    assert 0 < some["bleu_4"] < 100
    without_stem = text_metrics(QUESTIONS, given | {"2": "in the box"})
    assert without_stem["meteor"] < some["meteor"] < best["meteor"]


@pytest.mark.usefixtures("no_synonyms")
def test_the_command_reads_qaego4d(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qaego4d(tmp_path)
    lines = [{"question_id": "20", "answer": "on the table"}, {"question_id": "21", "answer": "in the car"}]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = ["score", "--questions", str(tmp_path / "annotations.test.json")]
    args += ["--predictions", str(tmp_path / "predictions.jsonl")]
    assert main([*args, "--text", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["all"] == {"accuracy": 50.0, "n": 2}
    assert said["text"].keys() == {"exact_match", "bleu_4", "meteor", "rouge_l"}
    assert said["text"]["exact_match"] == 50
    assert main(args) == 0
    assert "bleu" not in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.corpus, "wordnet", _Absent())
    with pytest.raises(TextMetricsError, match=r"METEOR needs WordNet, .*; run: python -m nltk\.downloader wordnet"):
        text_metrics(QUESTIONS, ANSWERS)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(TextMetricsError, match=r"rouge_score.* is not installed; run: pip install 'egopatch\[text-"):
        text_metrics(QUESTIONS, ANSWERS)
