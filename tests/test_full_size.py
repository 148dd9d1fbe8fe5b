"""End to end with the full-size network: real video -> store -> trained head, with a corrupt video in the data set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from egopatch.extract.encoders.checkpoints.standin import write_tokenizer
from egopatch.features import open_store
from tests.data.reference import formula

REFERENCE = Path(__file__).parent / "data" / "reference"
MEDIA = Path(os.environ.get("EGO_MEDIA", Path(__file__).parents[2] / "shared" / "media"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not MEDIA.is_dir(), reason="the sample videos are not here; EGO_MEDIA names their folder")
def test_full_size_network_extracts_a_real_video_and_trains_a_head(tmp_path: Path) -> None:
    clips = [
        {"clip_id": "first", "video": str(MEDIA / "ego4d_sample.mp4"), "start_s": 0.0, "end_s": 1.0},
        {"clip_id": "second", "video": str(MEDIA / "ego4d_sample.mp4"), "start_s": 1.0, "end_s": 2.0},
        {"clip_id": "corrupt", "video": str(MEDIA / "corrupted.mp4")},
    ]
    questions = [
        {"question_id": f"{part}-{clip}", "clip_id": clip, "question": text, "answer": answer, "part": part}
        for part in ("train", "val", "test")
        for clip, text, answer in [("first", "what is held?", "cup"), ("second", "is it moved?", "yes")]
    ]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(c) + "\n" for c in clips))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    weights = formula.state_dict(REFERENCE / "egovlpv2_keys.json", prefix="module.")
    torch.save({"state_dict": {k: torch.from_numpy(v) for k, v in weights.items()}}, tmp_path / "formula.pth")
    write_tokenizer(tmp_path / "tokenizer", [str(q["question"]) for q in questions], "roberta")
    config = [
        *("--config", "configs/own_videos.yaml", "--data.root", str(tmp_path), "--store.path", str(tmp_path / "store")),
        *("--encoder.checkpoint", str(tmp_path / "formula.pth"), "--text.model", str(tmp_path / "tokenizer")),
        # Without instructions for bfloat16, which CI's machines may lack, that takes six times as long.
        *("--encoder.dtype", "float32", "--run.dir", str(tmp_path / "run"), "--train.epochs", "2"),
    ]

    extracted = run("extract", "run", *config)
    assert extracted.returncode == 0, extracted.stderr
    assert "2/3 clips and 2 questions stored" in extracted.stdout
    assert "quarantined corrupt: video" in extracted.stdout

    store = open_store(tmp_path / "store")
    tokens = store.read(["second", "first"])
    assert tokens.patches.shape == (2, 16, 196, 768)
    assert "cannot be decoded" in store.quarantine["corrupt"].reason

    again = run("extract", "run", *config)
    assert "this run encoded 0 clips" in again.stdout

    trained = run("train", "fit", *config)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "test.json").read_text())["all"]["n"] == 2
