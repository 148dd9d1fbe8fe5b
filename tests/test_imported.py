"""A head trains on features that another program wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from egopatch.extract.__main__ import main as extract
from egopatch.extract.encoders.checkpoints.package import MINILM
from egopatch.features.__main__ import main as features
from egopatch.train.__main__ import main as train

CLIPS, COLOURS = 24, ("red", "green")


@pytest.mark.slow
def test_a_head_trains_on_imported_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, data = tmp_path / "files", tmp_path / "data"
    files.mkdir()
    data.mkdir()
    rng, clips, questions = np.random.default_rng(0), [], []
    for number in range(CLIPS):
        name, answer = f"clip{number}", number % len(COLOURS)
        patches = rng.normal(size=(2, 4, 8)).astype(np.float32)
        patches[..., answer] += 3
        np.save(files / f"{name}.npy", patches)
        clips.append(json.dumps({"clip_id": name, "video": f"{name}.mp4"}))
        part = ("train", "train", "train", "val", "test", "test")[number // 2 % 6]
        question = {"question_id": name, "clip_id": name, "question": "what colour?", "answer": COLOURS[answer]}
        questions.append(json.dumps({**question, "part": part}))
    (data / "clips.jsonl").write_text("\n".join(clips))
    (data / "questions.jsonl").write_text("\n".join(questions))
    args = [
        *("--data.name", "jsonl", "--data.root", str(data), "--encoder.arch", "imported", "--text.model", MINILM.name),
        *("--text.depth", "1", "--text.max_length", "8", "--store.path", str(tmp_path / "store")),
        *("--head.name", "pooled", "--head.width", "16", "--head.dropout", "0", "--encoder.device", "cpu"),
        *("--train.epochs", "20", "--train.batch", "4", "--train.lr", "1e-2"),
        *("--run.dir", str(tmp_path / "runs" / "pooled")),
        *("--train.device", "cpu"),
    ]
    assert extract(["run", *args]) == 1  # no store yet
    assert features(["import", str(files), "--to", str(tmp_path / "store")]) == 0
    assert extract(["plan", *args]) == 2
    assert "there is no video network to encode others" in capsys.readouterr().err
    monkeypatch.setattr("egopatch.extract.worker.device.has_bfloat16", lambda _: False)
    assert extract(["run", *args]) == 0
    assert "24/24 clips and 1 question stored" in (out := capsys.readouterr().out)
    assert "advice" not in out  # no clips are encoded, so encoder.dtype decides nothing
    assert extract(["status", *args]) == 0
    assert "24 clips came without stretch and video file, from `features import`" in capsys.readouterr().out
    assert train(["fit", *args]) == 0
    assert "note:" not in capsys.readouterr().out
    test = json.loads((tmp_path / "runs" / "pooled" / "test.json").read_text())
    assert test["model"] == "pooled (imported)"
    assert test["all"]["accuracy"] > 80
    assert train(["fit", *args, "--encoder.arch", "lite", "--run.dir", str(tmp_path / "runs" / "other")]) == 2
    assert "arch: store has 'imported', requested 'lite'" in capsys.readouterr().err
    (data / "clips.jsonl").write_text("\n".join([*clips, json.dumps({"clip_id": "more", "video": "more.mp4"})]))
    assert extract(["run", *args]) == 1
    error = capsys.readouterr().err
    assert "has no features for 1 of 25 clips, such as 'more'" in error
    assert "or remove these clips and their questions from the annotations" in error


def test_unavailable_text_model_error_suggests_the_packaged_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "files").mkdir()
    np.save(tmp_path / "files" / "a.npy", np.ones((2, 4, 8), np.float32))
    (tmp_path / "clips.jsonl").write_text('{"clip_id": "a", "video": "a.mp4"}')
    question = {"question_id": "1", "clip_id": "a", "question": "who?", "answer": "me", "part": "train"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    assert features(["import", str(tmp_path / "files"), "--to", str(tmp_path / "store")]) == 0
    args = [
        *("--data.name", "jsonl", "--data.root", str(tmp_path), "--encoder.arch", "imported"),
        *("--encoder.device", "cpu", "--store.path", str(tmp_path / "store"), "--text.model", "egopatch/no-such-model"),
    ]
    remedy = f"the packaged MiniLM needs no download: --text.model {MINILM.name} --text.depth 6"
    capsys.readouterr()
    assert extract(["run", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("extract run: error: text.model: egopatch/no-such-model is not a folder here")
    assert line.endswith(remedy)
    assert extract(["doctor", *args]) == 1
    assert remedy in capsys.readouterr().out
