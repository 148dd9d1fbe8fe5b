"""A whole job with a model of transformers: `extract run`, and training on what it stored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from egopatch.extract.__main__ import main as extract
from egopatch.extract.encoders import input_transform, load_video_encoder
from egopatch.extract.encoders.checkpoints.package import MINILM
from egopatch.extract.feed.on_host import to_input
from egopatch.features import open_store
from egopatch.train.__main__ import main as train
from tests.extract.job import CLIPS, options, videos

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}
PROCESSOR = {"size": {"shortest_edge": 36}, "crop_size": 32, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


@torch.inference_mode()
def called_directly(folder: Path, video: Path, out: Path) -> torch.Tensor:
    """Tokens [T, N, D] of a whole video after block 2, by transformers alone from the frames of `extract frames`."""
    assert extract(["frames", str(video), "--video.frames", "4", "--out", str(out / "frames.npz")]) == 0
    frames = np.load(out / "frames.npz")["frames"]
    pixels = to_input(frames, 32, input_transform("hf", folder, 32))[None]
    model = AutoModel.from_pretrained(folder).eval()
    return model(pixels, output_hidden_states=True).hidden_states[2].reshape(2, 16, 32)


@pytest.mark.slow
def test_tokens_of_a_tubelet_video_model_are_stored_and_trained_on(bare: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videomae"
    config = AutoConfig.for_model("videomae", **SIZES, image_size=32, patch_size=8, num_frames=4, tubelet_size=2)
    AutoModel.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    args = options(
        bare,
        *("--encoder.arch", "hf", "--encoder.checkpoint", str(folder), "--encoder.depth", "2", "--video.frames", "4"),
        *("--video.size", "32", "--text.model", MINILM.name, "--encoder.dtype", "float32"),
        *("--store.dtype", "float32"),
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
    assert torch.allclose(tokens.patches[0], called_directly(folder, videos(bare)[0], tmp_path), rtol=0, atol=1e-5)
    made = store.fingerprint.fields
    assert (made["model_type"], made["tubelet"], made["saliency"]) == ("videomae", 2, "norm")
    assert load_video_encoder("hf", folder, 4, 2, size=32).steps == 2
    assert train(["fit", *args]) == 0
    assert (tmp_path / "runs/psa/best.safetensors").is_file()
