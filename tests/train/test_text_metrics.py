"""BLEU, METEOR and ROUGE of answers, and the errors if a library or its data are missing."""

import json
import sys
from pathlib import Path

import nltk.corpus
import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

from egopatch.configs.schema import Config, DataConfig
from egopatch.extract.datasets import Question, load_dataset
from egopatch.train.__main__ import main
from egopatch.train.report.page import write_report
from egopatch.train.report.table import write_table
from egopatch.train.scores.statistics import Interval
from egopatch.train.scores.text_metrics import NAMES, TextMetricsError, text_intervals, text_metrics
from tests.extract.datasets.test_released import qaego4d
from tests.train.fake_runs import write_run

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
def test_text_metrics_rank_equal_similar_and_wrong_answers() -> None:
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
def test_score_command_reads_qaego4d(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Config, Path]:
    """Two seeds of one system on QAEgo4D: one right and one near answer, and one right and one empty answer."""
    (tmp_path / "data").mkdir()
    qaego4d(tmp_path / "data")
    for seed, second in enumerate(("in a drawer", "")):
        answers = {"20": "on the table", "21": second}
        write_run(tmp_path / "runs", f"psa_{seed}", seed=seed, all_=50, n=(2, 0), predictions=answers)
    return Config(data=DataConfig(name="qaego4d", root=tmp_path / "data")), tmp_path / "runs"


@pytest.mark.usefixtures("no_synonyms")
def test_text_metrics_of_qaego4d_appear_in_the_table_and_the_report(runs: tuple[Config, Path]) -> None:
    config, folder = runs
    (record,) = write_table(config, folder)
    questions = load_dataset(config.data).questions["test"]
    near, empty = (text_metrics(questions, {"20": "on the table", "21": given}) for given in ("in a drawer", ""))
    assert record["text"] == {name: round((near[name] + empty[name]) / 2, 2) for name in NAMES}
    assert record["text"]["exact_match"] == record["all"] == 50
    assert near["rouge_l"] > empty["rouge_l"] == 50
    text = (folder / "table.md").read_text()
    answers = [{"20": "on the table", "21": given} for given in ("in a drawer", "")]
    found = text_intervals(questions, answers)
    cells = " | ".join(f"{one.mean:.2f} [{one.low:.1f}, {one.high:.1f}]" for one in found.values())
    assert f"| System | Exact match | BLEU-4 | METEOR | ROUGE-L |\n|:--|--:|--:|--:|--:|\n| psa | {cells} |\n" in text
    page = write_report(config, folder).read_text()
    row = "".join(f"<td>{cell}</td>" for cell in cells.split(" | "))
    assert f"<td>psa</td>{row}</tr>" in page
    (folder / "psa_1" / "predictions.jsonl").unlink()
    assert "text" not in write_table(config, folder)[0]


def test_a_table_without_wordnet_says_what_it_needs(runs: tuple[Config, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = runs
    monkeypatch.setattr(nltk.corpus, "wordnet", _Absent())
    (record,) = write_table(config, folder)
    assert list(record)[-1] == "log"
    (line,) = (line for line in (folder / "table.md").read_text().splitlines() if "METEOR" in line)
    assert line.startswith("- Left out, or to check: no BLEU-4, METEOR and ROUGE-L: METEOR needs WordNet")


def test_no_questions_have_no_metrics() -> None:
    assert text_metrics([], {}) == {}
    assert text_intervals([], [{}]) == {}


WORDS = ("the", "cup", "is", "on", "a", "table")
CLIPS = 60


def made_up(generator: np.random.Generator) -> tuple[list[Question], list[dict[str, str]]]:
    """Questions on clips of one to four, and answers of two seeds that are right more often on some clips."""
    questions: list[Question] = []
    answers: list[dict[str, str]] = [{}, {}]
    for clip, count in enumerate(generator.integers(1, 5, size=CLIPS)):
        share = generator.uniform(0.3, 1)
        for _ in range(count):
            right = generator.choice(WORDS, size=generator.integers(3, 9))
            questions.append(Question(str(len(questions)), f"clip {clip}", "?", " ".join(right), "open", ()))
            for one in answers:
                words = np.where(generator.random(len(right)) < share, right, generator.choice(WORDS, len(right)))
                one[questions[-1].question_id] = " ".join(words[: generator.integers(2, len(right) + 1)])
    return questions, answers


@pytest.mark.usefixtures("no_synonyms")
def test_intervals_match_a_plain_bootstrap() -> None:
    generator = np.random.default_rng(3)
    questions, (answers, _) = made_up(generator)
    found, means = text_intervals(questions, [answers]), text_metrics(questions, answers)
    assert {name: one.mean for name, one in found.items()} == pytest.approx(means)
    of_clip = [[question for question in questions if question.clip_id == f"clip {clip}"] for clip in range(CLIPS)]
    bleu = BLEU(lowercase=True, smooth_method="none")
    drawn = []
    for _ in range(400):
        asked = [question for clip in generator.integers(CLIPS, size=CLIPS) for question in of_clip[clip]]
        said, right = [answers[one.question_id] for one in asked], [one.answer for one in asked]
        exact = 100 * np.mean([one == other for one, other in zip(said, right)])
        drawn.append((bleu.corpus_score(said, [right]).score, exact))
    for name, resampled in zip(("bleu_4", "exact_match"), np.array(drawn).T):
        low, high = np.percentile(resampled, [2.5, 97.5])
        assert found[name].high - found[name].low == pytest.approx(high - low, rel=0.15)
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=0.1 * (high - low))


@pytest.mark.usefixtures("no_synonyms")
def test_seeds_widen_the_interval_of_bleu() -> None:
    questions, answers = made_up(np.random.default_rng(4))
    one, both = text_intervals(questions, answers[:1])["bleu_4"], text_intervals(questions, answers)["bleu_4"]
    assert both.mean == pytest.approx(np.mean([text_metrics(questions, seed)["bleu_4"] for seed in answers]))
    far = answers[0] | {question.question_id: question.answer for question in questions[:40]}
    apart = text_intervals(questions, [answers[0], far])["bleu_4"]
    assert apart.high - apart.low > 2 * (one.high - one.low)


@pytest.mark.usefixtures("no_synonyms")
def test_a_seed_with_zero_bleu_gives_the_widest_interval() -> None:
    found = text_intervals(QUESTIONS, [dict.fromkeys(ANSWERS, "no"), ANSWERS])
    assert found["bleu_4"] == Interval(pytest.approx(50), 0.0, 100.0)


def test_missing_text_metric_packages_name_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.corpus, "wordnet", _Absent())
    with pytest.raises(TextMetricsError, match=r"METEOR needs WordNet, .*; run: python -m nltk\.downloader wordnet"):
        text_metrics(QUESTIONS, ANSWERS)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(TextMetricsError, match=r"rouge_score.* is not installed; run: pip install 'egopatch\[text-"):
        text_metrics(QUESTIONS, ANSWERS)
