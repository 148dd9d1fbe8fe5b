"""Whole networks, from pixels and token ids to logits, against the reference on inputs without recorded outputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from egopatch.extract.encoders import load_text_encoder, load_video_encoder
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint
from egopatch.extract.encoders.layers.video_encoder import resize_time
from egopatch.extract.encoders.networks.network import Variant
from egopatch.features.values.spec import PatchTokens
from egopatch.train.heads import load_head
from egopatch.train.heads.fused.fused import score_patches, select_patches
from tests.data.reference import formula
from tests.extract.encoders import reference
from tests.extract.encoders.networks import formula_checkpoint, relative, sequence, tiny
from tests.extract.encoders.reference import Tensors, attend, linear, norm

TOKENS, LOGITS = 1e-5, 1e-3
GROWTH = {"paper": reference.PAPER, "released": reference.RELEASED}
# Frames, batch, blocks, first fused block; the tiny networks have positions for 3 frames.
SHAPES = [(1, 2, 4, 2), (2, 1, 4, 3), (3, 3, 6, 3), (5, 1, 5, 1), (8, 2, 8, 5)]


def for_frames(p: Tensors, frames: int, fill: str = "interpolate") -> Tensors:
    """The tensors with temporal positions for `frames` frames."""
    return {**p, "video_model.temporal_embed": resize_time(p["video_model.temporal_embed"], frames, fill)}


def layer(p: Tensors, x: Tensor, bias: Tensor, names: tuple[str, ...], eps: float) -> Tensor:
    """A post-norm text layer; `names` of query, key, value, output, its norm, two MLP layers, their norm."""
    q, k, v = (linear(p, name, x).unflatten(-1, (-1, 64)).transpose(1, 2) for name in names[:3])
    own = linear(p, names[3], attend(q, k, v, bias)[0].transpose(1, 2).flatten(2))
    x = norm(p, names[4], x + own, eps)
    return norm(p, names[7], x + linear(p, names[6], F.gelu(linear(p, names[5], x))), eps)


def plain_roberta(p: Tensors, ids: Tensor, mask: Tensor, depth: int) -> Tensor:
    """States [B, L, D] after `depth` layers; padding (id 1) has position 1, the others count from 2."""
    root = "text_model.embeddings"
    real = (ids != 1).long()
    x = p[f"{root}.word_embeddings.weight"][ids] + p[f"{root}.token_type_embeddings.weight"][0]
    x = norm(p, f"{root}.LayerNorm", x + p[f"{root}.position_embeddings.weight"][real.cumsum(1) * real + 1], 1e-5)
    bias = (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
    for i in range(depth):
        at = f"text_model.encoder.layer.{i}"
        attention = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        rest = ("attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense")
        names = (*attention, *(f"{at}.{part}" for part in (*rest, "output.LayerNorm")))
        x = layer(p, x, bias, names, 1e-5)
    return x


def plain_distilbert(p: Tensors, ids: Tensor, mask: Tensor, depth: int) -> Tensor:
    """States [B, L, D] after `depth` layers."""
    root = "text_model.embeddings"
    x = p[f"{root}.word_embeddings.weight"][ids] + p[f"{root}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(p, f"{root}.LayerNorm", x, 1e-12)
    bias = (1 - mask[:, None, None].float()) * torch.finfo(torch.float32).min
    for i in range(depth):
        parts = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm")
        names = tuple(
            f"text_model.transformer.layer.{i}.{part}" for part in (*parts, "ffn.lin1", "ffn.lin2", "output_layer_norm")
        )
        x = layer(p, x, bias, names, 1e-12)
    return x


def questions(count: int, vocabulary: int, pad: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids [B, 9] of questions of different lengths, and their mask."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocabulary, (count, 9), generator=random)
    lengths = torch.randint(2, 10, (count, 1), generator=random)
    mask = torch.arange(9) < lengths
    return ids.where(mask, torch.tensor(pad)), mask


def video_of(frames: int, batch: int, size: int, seed: int) -> Tensor:
    return torch.randn(batch, frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


def check_egovlpv2(checkpoint: Checkpoint, video: Tensor, ids: Tensor, mask: Tensor, fusion: int) -> None:
    frames = video.shape[1]
    p = for_frames(checkpoint.tensors, frames)
    for depth in sorted({1, fusion}):
        tokens = load_video_encoder("egovlpv2", checkpoint, frames, depth)(video)
        expected, over = reference.encode(p, video, depth)
        assert relative(sequence(tokens), expected) < TOKENS
        assert relative(tokens.saliency.flatten(1), over[:, 1:]) < TOKENS
    states = load_text_encoder("egovlpv2", checkpoint, fusion)(ids, mask)
    with torch.inference_mode():
        text = plain_roberta(p, ids, mask, fusion)
        answers = reference.answer(p, expected, frames, text, mask, fusion)
        got = load_head("egovlpv2", checkpoint)(tokens, states, mask)
    assert relative(states[mask], text[mask]) < TOKENS
    assert (got - answers).abs().max() < LOGITS


def check_mfas(checkpoint: Checkpoint, video: Tensor, ids: Tensor, mask: Tensor, fusion: int, variant: Variant) -> None:
    frames, growth = video.shape[1], GROWTH[variant]
    p = for_frames(checkpoint.tensors, frames)
    tokens = load_video_encoder("mfas", checkpoint, frames, fusion, variant=variant)(video)
    states = load_text_encoder("mfas", checkpoint, fusion)(ids, mask)
    with torch.inference_mode():
        fine, coarse, over_fine, over_coarse = reference.mfas_encode(p, video, fusion, growth)
        score = reference.mfas_score(over_fine, over_coarse)
        kept = reference.mfas_select(score, growth)
        text = plain_roberta(p, ids, mask, fusion)
        answers = reference.mfas_answer(p, fine, kept, text, mask, fusion)
        got = load_head("mfas", checkpoint, variant=variant)(tokens, states, mask)
    assert relative(sequence(tokens), fine) < TOKENS
    assert relative(tokens.coarse.flatten(1, 2), coarse[:, 1:]) < TOKENS
    assert relative(tokens.saliency, over_fine) < TOKENS
    assert relative(tokens.coarse_saliency, over_coarse) < TOKENS
    ours = score_patches(tokens.saliency, tokens.coarse_saliency)
    assert relative(ours, score) < TOKENS
    assert torch.equal(select_patches(ours, growth.top), kept.bool())
    assert (got - answers).abs().max() < LOGITS


def check_bfloat16(fast: PatchTokens, exact: PatchTokens) -> None:
    assert fast.patches.dtype == torch.bfloat16
    assert fast.saliency.dtype == torch.float32
    assert relative(sequence(fast), sequence(exact)) < 1e-2


@pytest.mark.parametrize(("frames", "batch", "depth", "fusion"), SHAPES)
@pytest.mark.parametrize(("width", "size"), [(64, 64), (192, 96)])
def test_egovlpv2_matches_the_reference(
    tmp_path: Path, frames: int, batch: int, depth: int, fusion: int, width: int, size: int
) -> None:
    checkpoint = tiny(tmp_path, depth=depth, fusion=fusion, width=width, size=size)
    vocabulary = checkpoint.shape("text_model.embeddings.word_embeddings.weight")[0]
    ids, mask = questions(batch, vocabulary, 1, frames)
    check_egovlpv2(checkpoint, video_of(frames, batch, size, depth), ids, mask, fusion)


@pytest.mark.parametrize(("frames", "batch", "depth", "fusion"), [s for s in SHAPES if s[2] - s[3] >= 3])
def test_egovlpv2_video_only_path_matches_the_reference(
    tmp_path: Path, frames: int, batch: int, depth: int, fusion: int
) -> None:
    checkpoint = tiny(tmp_path, depth=depth, fusion=fusion)
    video, p = video_of(frames, batch, 64, fusion), for_frames(checkpoint.tensors, frames)
    for tapped in (1, fusion, depth - 1, depth):
        expected, _ = reference.encode(p, video, tapped, "dual")
        if tapped == depth:
            expected = norm(p, "video_model.norm", expected, 1e-5)
        encoder = load_video_encoder("egovlpv2", checkpoint, frames, tapped, "dual")
        tokens = encoder(video)
        assert relative(sequence(tokens), expected) < TOKENS
        if tapped == depth:
            assert encoder.project(tokens.cls).shape == (batch, 32)
        else:
            with pytest.raises(ValueError, match=f"project has no meaning at depth {tapped}"):
                encoder.project(tokens.cls)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(
    ("frames", "batch", "depth"), [(3, 2, 3), (3, 2, 4), (1, 2, 5), (2, 1, 6), (5, 1, 7), (7, 2, 5)]
)
def test_mfas_matches_the_reference(tmp_path: Path, frames: int, batch: int, depth: int, variant: Variant) -> None:
    checkpoint = tiny(tmp_path, "mfas", depth=depth, size=128)
    vocabulary = checkpoint.shape("text_model.embeddings.word_embeddings.weight")[0]
    ids, mask = questions(batch, vocabulary, 1, frames)
    check_mfas(checkpoint, video_of(frames, batch, 128, depth), ids, mask, 2, variant)


@pytest.mark.parametrize(("frames", "batch"), [(1, 3), (2, 1), (3, 2), (7, 2)])
def test_egovlp_matches_the_reference(tmp_path: Path, frames: int, batch: int) -> None:
    checkpoint = tiny(tmp_path, "egovlp", depth=3)
    p = for_frames(checkpoint.tensors, frames, "zeros")
    video = video_of(frames, batch, 64, batch)
    for depth in (2, 3):
        expected, _ = reference.encode(p, video, depth, "dual", eps=1e-6)
        if depth == 3:
            expected = norm(p, "video_model.norm", expected, 1e-6)
        encoder = load_video_encoder("egovlp", checkpoint, frames, depth)
        tokens = encoder(video)
        assert relative(sequence(tokens), expected) < TOKENS
    assert relative(encoder.project(tokens.cls), linear(p, "vid_proj.0", expected[:, 0])) < TOKENS
    ids, mask = questions(batch, checkpoint.shape("text_model.embeddings.word_embeddings.weight")[0], 0, frames)
    for depth in (1, 3):
        text = load_text_encoder("egovlp", checkpoint, depth)
        states, plain = text(ids, mask), plain_distilbert(p, ids, mask, depth)
        assert relative(states[mask], plain[mask]) < TOKENS
    assert relative(text.project(states[:, 0]), linear(p, "txt_proj.1", F.relu(plain[:, 0]))) < TOKENS


@pytest.mark.parametrize(("arch", "frames", "width"), [("egovlpv2", 8, 256), ("egovlp", 3, 192), ("mfas", 4, 128)])
def test_bfloat16_tokens_stay_close_to_float32(tmp_path: Path, arch: str, frames: int, width: int) -> None:
    sizes = {"depth": 9, "fusion": 6} if arch != "mfas" else {"depth": 5, "fusion": 2}
    checkpoint = tiny(tmp_path, arch, width=width, size=128, **sizes)
    depth = 2 if arch == "mfas" else 6
    video = video_of(frames, 2, 128, width)
    exact, fast = (
        load_video_encoder(arch, checkpoint, frames, depth, dtype=dtype)(video)
        for dtype in (torch.float32, torch.bfloat16)
    )
    check_bfloat16(fast, exact)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["egovlpv2", "mfas"])
def test_full_size_bfloat16_tokens_stay_close_to_float32(network: str) -> None:
    video = torch.from_numpy(formula.frames(1, 4, key="another"))
    exact, fast = (
        load_video_encoder(network, formula_checkpoint(network), 4, 6, dtype=dtype)(video)
        for dtype in (torch.float32, torch.bfloat16)
    )
    check_bfloat16(fast, exact)
    assert relative(fast.saliency, exact.saliency) < 2e-2
