"""`train ask`: the answers of a trained head to one question, equal to those that evaluation gives."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from egopatch.configs.schema import Config, ConfigError
from egopatch.features import Fingerprint, FingerprintMismatch
from egopatch.train.__main__ import main
from egopatch.train.fitting.experiment import open_experiment
from egopatch.train.fitting.fit import fit
from egopatch.train.fitting.predict import predict
from egopatch.train.report.kept_picture import mark_kept
from tests.train.tiny import with_run


@pytest.fixture
def trained(tiny: Config) -> Config:
    config = with_run(tiny, "psa", train_epochs=1)
    fit(config, "python -m train fit")
    return config


def test_answers_and_kept_patches_are_those_of_evaluation(trained: Config) -> None:
    folder = trained.run.dir
    predicted = {line["question_id"]: line["answer"] for line in _lines(folder / "predictions.jsonl")}
    questions = open_experiment(trained).encoded["test"].questions[:6]
    with np.load(folder / "selection.npz") as saved:
        kept = dict(zip(saved["question_ids"].tolist(), saved["kept"].tolist(), strict=True))
    for question in questions:
        prediction = predict(trained, question.clip_id, question.text, answers=99)
        assert prediction.answers[0][0] == predicted[question.question_id]
        assert [list(frame) for frame in prediction.kept] == kept[question.question_id]
        shares = [share for _, share in prediction.answers]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.0001  # the two unknown answers have the rest
        assert prediction.unknown_words == ()


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_question_is_encoded_with_the_stores_network(trained: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = open_experiment(trained)
    clip_id, known = experiment.encoded["test"].questions[0].clip_id, experiment.encoded["test"].questions[0].text
    assert experiment.text_fingerprint is not None
    states = predict(trained, clip_id, known).answers
    fields = [experiment.text_fingerprint]

    def encode(config: Config, texts: list[str]) -> tuple[Fingerprint, dict[str, dict[str, torch.Tensor]]]:
        from egopatch.train.fitting.experiment import open_features

        read = open_features(config, "text", None).read_text([known])
        return fields[0], {texts[0]: {"states": read.states[0], "attention_mask": read.attention_mask[0]}}

    monkeypatch.setattr("egopatch.extract.run.encode_questions", encode)
    prediction = predict(trained, clip_id, f"Zebra? {known}")
    assert prediction.answers == states
    assert prediction.unknown_words == ("zebra",)
    fields[0] = Fingerprint({**fields[0].fields, "depth": 99})
    with pytest.raises(FingerprintMismatch, match=r"text network is not that of store .* \(depth: store has 6, config"):
        predict(trained, clip_id, f"Zebra? {known}")


def test_the_command(trained: Config, capsys: pytest.CaptureFixture[str]) -> None:
    question = open_experiment(trained).encoded["test"].questions[0]
    ask = ["ask", "--config", str(trained.run.dir / "config.yaml"), "--clip", question.clip_id, question.text]
    assert main(ask) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].strip().partition("%")[2].strip()
    assert any(": kept 6 of 12 patches" in line for line in out)
    assert main([*ask, "--json", "--answers", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["answers"]) == 2
    assert shown["grid"] == [3, 4]
    assert main([*ask[:3], "--clip", question.clip_id[:-1], question.text]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--clip is {question.clip_id[:-1]!r}, which is not in store" in line
    assert "; did you mean 'clip|" in line


def test_heads_that_cannot_be_asked(tiny: Config) -> None:
    config = with_run(tiny, "majority", head_name="majority", train_epochs=1)
    fit(config, "x")
    with pytest.raises(ConfigError, match="holds a majority head; expected one that reads video"):
        predict(config, "clip|P0|0|1", "what?")
    blank = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=config.run.dir / "none"))
    with pytest.raises(ValueError, match="train the head first"):
        predict(blank, "clip|P0|0|1", "what?")


def test_kept_patches_are_outlined_and_the_others_dimmed() -> None:
    marked = mark_kept(np.ones((3, 16, 16), np.float32), [1], grid=(1, 2))
    assert np.allclose(marked[:, :, :8], 0.35)
    assert np.allclose(marked[:, 2:14, 10:14], 1)  # inside
    assert np.allclose(marked[:, 0, 8], np.array([255, 214, 0]) / 255)
