"""The fast modules against the plain reference, on tiny networks and inputs of many shapes."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from egopatch.extract.encoders import load_text_encoder, load_video_encoder
from egopatch.extract.encoders.layers import spacetime
from egopatch.extract.encoders.layers.linear import Linear, can_pack
from egopatch.extract.encoders.layers.spacetime import Attention
from egopatch.extract.encoders.layers.video_encoder import resize_time
from egopatch.extract.errors import CheckpointError
from tests.extract.encoders import reference
from tests.extract.encoders.networks import relative, sequence, tiny

CLOSE = 1e-5


def test_mfas_from_egovlpv2_starts_as_egovlpv2(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    video = torch.randn(1, 3, 3, 64, 64)
    plain = load_video_encoder("egovlpv2", checkpoint, 3, 2)(video)
    start = load_video_encoder("mfas", checkpoint, 3, 2)(video)
    assert relative(sequence(start), sequence(plain)) < CLOSE
    # The coarse tower is a copy of the fine one: pooled positioned tokens through the same blocks.
    coarse = reference.halve(reference.embed(checkpoint.tensors, video, "cls_token"), 3)
    for i in range(2):
        coarse, _ = reference.block(checkpoint.tensors, f"video_model.blocks.{i}", coarse, 3, 1e-5)
    assert start.coarse is not None
    assert relative(start.coarse.flatten(1, 2), coarse[:, 1:]) < CLOSE


@pytest.mark.parametrize("axis", ["time", "space"])
def test_attention_over_kept_tokens_matches_the_masked_reference(axis: Literal["time", "space"]) -> None:
    width, frames, patches = 128, 3, 5
    attention = Attention(width)
    p = {f"a.{name}": tensor for name, tensor in attention.state_dict().items()}
    x = torch.randn(2, 1 + frames * patches, width)
    keep = torch.rand(2, 1 + frames * patches) < 0.6
    keep[:, 0] = True
    expected, logits = reference.divided(p, "a", x, frames, axis, torch.where(keep, 1.0, -1e5))
    with torch.no_grad():
        got, tapped = attention(x, frames, axis, keep, tap=True)
    assert relative(got, expected) < CLOSE
    assert relative(tapped, logits) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_layer_matches_the_plain_one(dtype: torch.dtype) -> None:
    layer = Linear(96, 160).to(dtype)
    if not can_pack(layer.weight):
        pytest.skip("this machine has no packed path for the type")
    for rows in (1, 7, 200):
        x, residual = torch.randn(2, rows, 96).to(dtype), torch.randn(2, rows, 160).to(dtype)
        calls: list[dict] = [{}, {"gelu": True}, {"residual": residual}]
        layer.unpack()
        with torch.no_grad():
            plain = [layer(x, **call) for call in calls]
            layer.pack()
            for expected, call in zip(plain, calls, strict=True):
                assert relative(layer(x, **call), expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    # Gradients never go through the packed copy.
    layer(torch.randn(3, 96).to(dtype), gelu=True).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "logits"), [(1, 1), (12, 400), (10**6, 10**6)])
def test_chunked_attention_matches_whole_attention(
    axis: Literal["time", "space"], dtype: torch.dtype, rows: int, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = Attention(128).requires_grad_(False)
    x, residual = torch.randn(2, 1 + 3 * 5, 128), torch.randn(2, 1 + 3 * 5, 128)
    whole, _ = attention(x, 3, axis, residual=residual)  # with gradients on, all at once
    monkeypatch.setattr(spacetime, "ROWS", rows)
    monkeypatch.setattr(spacetime, "LOGITS", logits)
    with torch.no_grad():
        parts, _ = attention.to(dtype)(x.to(dtype), 3, axis, residual=residual.to(dtype))
    assert relative(parts.float(), whole) < (CLOSE if dtype == torch.float32 else 1e-2)


def test_clip_tokens_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    encoder = load_video_encoder("egovlpv2", tiny(tmp_path), 3, 2)
    video = torch.randn(4, 3, 3, 64, 64)
    assert relative(sequence(encoder(video))[2:3], sequence(encoder(video[2:3]))) < 1e-6


def test_temporal_positions_are_resized_to_the_number_of_frames() -> None:
    have = torch.randn(1, 4, 8)
    assert torch.equal(resize_time(have, 3, "interpolate"), have[:, :3])
    more = resize_time(have, 16, "interpolate")
    torch.testing.assert_close(more[:, [0, 5, 10, 15]], have)  # aligned corners: every fifth one is an old one
    torch.testing.assert_close(more[:, 1], have[:, 0] * 0.8 + have[:, 1] * 0.2)
    zeros = resize_time(have, 16, "zeros")
    assert torch.equal(zeros[:, :4], have)
    assert not zeros[:, 4:].any()


def test_text_network_ignores_padding(tmp_path: Path) -> None:
    for arch in ("egovlpv2", "egovlp"):
        encoder = load_text_encoder(arch, tiny(tmp_path, arch), 2)
        ids = torch.tensor([[0, 9, 12, 2, 1, 1]])
        mask = torch.tensor([[True, True, True, True, False, False]])
        padded = encoder(ids, mask)
        assert padded.shape == (1, 6, 128)
        torch.testing.assert_close(padded[:, :4], encoder(ids[:, :4], mask[:, :4]), atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="project has no meaning at depth 2"):
            encoder.project(padded[:, 0])


def test_sizes_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    encoder = load_video_encoder("egovlpv2", tiny(tmp_path, width=64, size=80), 3, 2)
    assert (encoder.grid, encoder.width, encoder.depth, encoder.num_frames, encoder.size) == ((5, 5), 64, 2, 3, 80)


def test_frames_of_the_wrong_shape_are_refused(tmp_path: Path) -> None:
    encoder = load_video_encoder("egovlpv2", tiny(tmp_path), 3, 2)
    with pytest.raises(
        ValueError, match=r"frames has shape \(1, 4, 3, 64, 64\); this encoder takes \[B, 3, 3, 64, 64\]"
    ):
        encoder(torch.zeros(1, 4, 3, 64, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "vlp"}, "arch is 'vlp'; expected one of egovlp, egovlpv2, hf, imported, lite, mfas"),
        ({"path": "both"}, "path is 'both'; expected fused or dual"),
        ({"num_frames": 0}, "num_frames is 0; expected at least 1"),
        ({"variant": "mine"}, "variant is 'mine'; expected paper or released"),
        ({"depth": 3}, "depth is 3; expected 1 to 2, where the question enters the fused path"),
        ({"depth": 5, "path": "dual"}, "depth is 5; expected 1 to 4, the number of its blocks"),
        ({"size": 96}, r"video\.size is 96, but .* takes frames of 64 pixels; set video\.size to 64"),
        ({"arch": "egovlp"}, "this EgoVLPv2 checkpoint was found where EgoVLP is expected; set encoder.arch"),
    ],
)
def test_impossible_requests_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    request = {"arch": "egovlpv2", "num_frames": 3, "depth": 2} | options
    with pytest.raises(ValueError, match=message):
        load_video_encoder(checkpoint=tiny(tmp_path), **request)


def test_mfas_needs_even_sides(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="MFAS pools 2x2 patches"):
        load_video_encoder("mfas", tiny(tmp_path, size=80), 3, 2)


def test_text_depth_is_checked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="depth is 9; expected 1 to 4, the number of its text layers"):
        load_text_encoder("egovlpv2", tiny(tmp_path), 9)
