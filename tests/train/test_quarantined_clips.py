"""Training and evaluation where clips are in quarantine."""

import json
from pathlib import Path

import pytest
import torch

from egopatch.configs.schema import ConfigError
from egopatch.train.__main__ import main
from egopatch.train.fitting.answers import Answers, PartScorer, score_part
from egopatch.train.fitting.experiment import open_experiment
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.fitting.predict import predict_clips
from egopatch.train.rundir.run_folder import RunError
from tests.train.tiny import with_run, write_tiny, written


def test_quarantined_clips_are_answered_blind_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test_clip, train_clip = "clip|P47|0|48", "clip|P0|0|1"
    config = write_tiny(tmp_path, bad=(test_clip, train_clip))
    line = "note: 8 of 64 test questions are about quarantined clips; the majority answer stands in\n"
    printed = []
    for command in (lambda: fit(config, "x"), lambda: evaluate(config)):
        metrics = command()
        assert json.loads((config.run.dir / "test.json").read_text())["unseen"] == metrics.quarantined == 8
        assert metrics.all.n == 64
        printed.append(capsys.readouterr().out)
        assert printed[-1].endswith(line)
    train_line = "note: 8 of 256 train questions are about quarantined clips; nothing is learned from them\n"
    assert [train_line in out for out in printed] == [True, False]
    with pytest.raises(ConfigError, match=r"clip 'clip\|P47\|0\|48' is in quarantine: "):
        predict_clips(config, [test_clip], "what?")
    answers = [json.loads(line) for line in (config.run.dir / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 64


@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_json_counts_the_questions_about_quarantined_clips(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny(tmp_path, bad=("clip|P47|0|48",))
    fit(config, "x")
    capsys.readouterr()
    assert main([command, "--config", written(config), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["quarantined"] == 8
    assert "note: 8 of 64 test questions are about quarantined clips" in err


@pytest.mark.parametrize(("questions", "clips"), [("64 test", range(33, 48, 2)), ("256 train", range(32))])
def test_a_run_whose_clips_are_all_quarantined_is_refused(tmp_path: Path, questions: str, clips: range) -> None:
    config = write_tiny(tmp_path, bad=tuple(f"clip|P{i}|0|{i + 1}" for i in clips))
    refusal = (
        rf"^.* has {questions} questions, all about quarantined clips, .*`egopatch extract retry --config CONFIG`$"
    )
    with pytest.raises(RunError, match=refusal):
        fit(config, "x")
    fit(with_run(config, "blind", head_name="majority"), "x")


@pytest.mark.parametrize("part", ["val", "test"])
def test_part_scorer_accuracies_match_the_metrics(tmp_path: Path, part: str) -> None:
    experiment = open_experiment(write_tiny(tmp_path, bad=("clip|P47|0|48", "clip|P46|0|47", "clip|P0|0|1")))
    vocabulary = experiment.dataset.answers
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(len(vocabulary), (len(experiment.encoded[part]),), generator=generator)
    answers = Answers(classes, None)
    metrics = score_part(experiment, part, answers)[0]
    expected = {"open": metrics.open, "binary": metrics.binary, "all": metrics.all}
    assert PartScorer(experiment, part).accuracies(answers) == {
        name: pytest.approx(a.accuracy) for name, a in expected.items()
    }
