"""The full-size networks with formula weights against recorded outputs of the published code."""

import pytest
import torch
from torch import Tensor

from egopatch.extract.encoders import load_text_encoder, load_video_encoder
from egopatch.features.values.spec import PatchTokens
from tests.extract.encoders.networks import (
    dev_frames,
    formula_checkpoint,
    published_fused6,
    recorded,
    relative,
    sequence,
)

TOLERANCE = 1e-4


def _close(tokens: PatchTokens, name: str, network: str = "egovlpv2") -> None:
    expected = recorded(network)
    got = sequence(tokens)
    assert relative(got[:, expected["positions"]], expected[name]) < TOLERANCE
    assert abs(got.mean() - expected[f"{name}_mean"]) < TOLERANCE
    assert abs(got.std() - expected[f"{name}_std"]) < TOLERANCE


@pytest.mark.slow
def test_question_answering_path_matches_recorded_tokens() -> None:
    _close(published_fused6(), "fused6")


@pytest.mark.slow
def test_video_only_path_matches_recorded_tokens() -> None:
    encoder = load_video_encoder("egovlpv2", formula_checkpoint("egovlpv2"), 16, 12, "dual")
    after_six: list[Tensor] = []
    encoder.trunk.blocks[5].register_forward_hook(lambda *call: after_six.append(call[2][0].clone()))
    tokens = encoder(dev_frames(16))
    _close(tokens, "dual12")
    assert relative(tokens.cls, recorded("egovlpv2")["video_cls"]) < TOLERANCE
    expected = recorded("egovlpv2")
    assert relative(after_six[0][:, expected["positions"]], expected["dual6"]) < TOLERANCE
    assert abs(after_six[0].mean() - expected["dual6_mean"]) < TOLERANCE


def _text(network: str, depth: int) -> tuple[Tensor, Tensor]:
    expected = recorded(network)
    encoder = load_text_encoder("egovlp" if network == "egovlp" else "egovlpv2", formula_checkpoint(network), depth)
    states = encoder(expected["ids"], expected["am"])
    return states, encoder.project(states[:, 0])


@pytest.mark.slow
def test_roberta_without_video_matches_recorded_states() -> None:
    states, joint = _text("egovlpv2", 12)
    assert relative(states, recorded("egovlpv2")["text_hidden"]) < TOLERANCE
    assert joint.shape == (2, 4096)


@pytest.mark.slow
def test_egovlp_video_matches_recorded_tokens() -> None:
    encoder = load_video_encoder("egovlp", formula_checkpoint("egovlp"), 4, 12)
    tokens = encoder(dev_frames(4))
    _close(tokens, "tokens", "egovlp")
    assert relative(encoder.project(tokens.cls), recorded("egovlp")["video_embed"]) < TOLERANCE


@pytest.mark.slow
def test_egovlp_text_matches_recorded_embeddings() -> None:
    assert relative(_text("egovlp", 6)[1], recorded("egovlp")["text_embed"]) < TOLERANCE


@pytest.mark.parametrize(("arch", "frames"), [("egovlpv2", 16), ("egovlp", 4)])
def test_incomplete_published_checkpoint_is_refused(arch: str, frames: int) -> None:
    from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError

    whole = formula_checkpoint(arch)
    tensors = {name: torch.empty(0) for name in whole.tensors}
    tensors |= {name: whole.tensors[name] for name in tensors if "blocks.0." in name or "embed" in name}
    with pytest.raises(CheckpointError, match=r"wrong shape|is missing|no tensor"):
        load_video_encoder(arch, Checkpoint(whole.path, "bare", tensors), frames, 2)
