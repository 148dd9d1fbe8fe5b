"""A whole job with a model of transformers: `extract run`, and training on what it stored."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from egopatch.extract.__main__ import main as extract
from egopatch.extract.encoders import load_video_encoder
from egopatch.extract.encoders.checkpoints.package import MINILM
from egopatch.features import open_store
from egopatch.train.__main__ import main as train
from tests.extract.job import CLIPS, options

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
PROCESSOR = {"size": {"shortest_edge": 36}, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@pytest.mark.slow
def test_a_video_model_with_tubelets_is_stored_and_trained_on(bare: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videomae"
    config = AutoConfig.for_model("videomae", **SIZES, image_size=32, patch_size=8, num_frames=4, tubelet_size=2)
    AutoModel.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    args = options(
        bare,
        *("--encoder.arch", "hf", "--encoder.checkpoint", str(folder), "--encoder.depth", "2", "--video.frames", "4"),
        *("--video.size", "32", "--text.model", MINILM.name, "--encoder.dtype", "float32"),
        *("--run.dir", str(tmp_path / "runs/psa"), "--run.table", str(tmp_path / "runs"), "--train.epochs", "1"),
    )
    assert extract(["doctor", *args]) == 0
    assert extract(["run", *args]) == 0
    store = open_store(bare / "store")
    assert len(store.clip_ids) == CLIPS
    tokens = store.read(store.clip_ids)
    assert tokens.patches.shape == (CLIPS, 2, 16, 32)  # four frames, two to a position
    assert tokens.timestamps is not None
    assert torch.all(tokens.timestamps[:, 1] > tokens.timestamps[:, 0])
    made = store.fingerprint.fields
    assert (made["model_type"], made["tubelet"], made["saliency"]) == ("videomae", 2, "norm")
    assert load_video_encoder("hf", folder, 4, 2, size=32).steps == 2
    assert train(["fit", *args]) == 0
    assert (tmp_path / "runs/psa/best.safetensors").is_file()
