"""Fused heads: with encoders and text they are the published networks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from egopatch.extract.encoders import load_text_encoder, load_video_encoder
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.features.values.spec import PatchTokens
from egopatch.train.heads import load_head
from egopatch.train.heads.fused.fused import score_patches, select_patches
from tests.extract.encoders import reference
from tests.extract.encoders.networks import dev_frames, formula_checkpoint, published_fused6, recorded, sequence, tiny


def _inputs(checkpoint: Checkpoint, arch: str, variant: str = "paper") -> tuple[PatchTokens, Tensor, Tensor]:
    """Tokens of 2 clips, states and mask of 2 questions of different length."""
    tokens = load_video_encoder(arch, checkpoint, 3, 2, variant=variant)(torch.randn(2, 3, 3, 64, 64))
    ids = torch.tensor([[0, 9, 12, 30, 2, 1], [0, 8, 2, 1, 1, 1]])
    mask = ids != 1
    return tokens, load_text_encoder(arch, checkpoint, 2)(ids, mask), mask


@pytest.mark.parametrize("arch", ["egovlpv2", "mfas"])
def test_questions_sharing_a_clip_get_the_logits_of_separate_clips(tmp_path: Path, arch: str) -> None:
    checkpoint = tiny(tmp_path, arch)
    tokens, states, mask = _inputs(checkpoint, arch)
    head = load_head(arch, checkpoint)
    index = torch.tensor([1, 0, 1, 1])
    question = torch.tensor([0, 0, 1, 0])
    own = PatchTokens(**{name: tensor[index] for name, tensor in tokens.tensors().items()})
    shared = head(tokens, states[question], mask[question], index)
    torch.testing.assert_close(shared, head(own, states[question], mask[question]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(shared[0], shared[3])
    assert not torch.allclose(shared[0], shared[1])


def test_gradients_match_the_published_network(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    tokens, states, mask = _inputs(checkpoint, "egovlpv2")
    tokens, states = PatchTokens(**{k: v.clone() for k, v in tokens.tensors().items()}), states.clone()
    index = torch.tensor([0, 0])
    own = sequence(tokens)[index]
    names = [
        "video_model.blocks.2.attn.qkv.weight",
        "video_model.blocks.2.attn.alpha_i2t",
        "video_model.blocks.3.attn.qkv.weight",
        "video_model.blocks.3.timeattn.proj.weight",
        "video_model.blocks.3.attn.qkv_text_i2t.weight",
        "text_model.encoder.layer.2.crossattention_t2i.self.key.weight",
        "text_model.encoder.layer.2.alpha_t2i",
        "projector_1.weight",
    ]
    p = dict(checkpoint.tensors) | {name: checkpoint.tensors[name].clone().requires_grad_() for name in names}
    answers = torch.tensor([3, 5])
    F.cross_entropy(reference.answer(p, own, 3, states, mask, 2), answers).backward()
    head = load_head("egovlpv2", checkpoint)
    F.cross_entropy(head(tokens, states, mask, index), answers).backward()
    ours = {
        "video_model.blocks.2.attn.qkv.weight": head.blocks[0].attn.qkv.weight,
        "video_model.blocks.2.attn.alpha_i2t": head.blocks[0].text.alpha_i2t,
        "video_model.blocks.3.attn.qkv.weight": head.blocks[1].attn.qkv.weight,
        "video_model.blocks.3.timeattn.proj.weight": head.blocks[1].timeattn.proj.weight,
        "video_model.blocks.3.attn.qkv_text_i2t.weight": head.blocks[1].text.qkv_text_i2t.weight,
        "text_model.encoder.layer.2.crossattention_t2i.self.key.weight": head.layers[0].video.key.weight,
        "text_model.encoder.layer.2.alpha_t2i": head.layers[0].gate,
        "projector_1.weight": head.projector_1.weight,
    }
    for name in names:
        torch.testing.assert_close(ours[name].grad, p[name].grad, atol=1e-6, rtol=1e-3, msg=name)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_fused_head_learns_answers_that_need_clip_and_question(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = tiny(tmp_path, width=64)
    tokens, states, mask = _inputs(checkpoint, "egovlpv2")
    tokens, states = PatchTokens(**{k: v.clone() for k, v in tokens.tensors().items()}), states.clone()
    # The answer depends on both clip and question.
    index, question, answers = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 3])
    head = load_head("egovlpv2", checkpoint, answers=32).train()
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(50):
        loss = F.cross_entropy(head(tokens, states[question], mask[question], index), answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert head.eval()(tokens, states[question], mask[question], index).argmax(dim=1).tolist() == answers.tolist()


@pytest.mark.parametrize("side", [4, 8, 14])
@pytest.mark.parametrize("top", [1, 3])
def test_selection_grows_as_in_the_reference(side: int, top: int) -> None:
    torch.manual_seed(side + top)
    score = torch.rand(5, 9, side * side)
    # The best patches lie in the row above the region, where most of them touch it and may join.
    first = 2 * max(1, side // 7) * side
    score[..., first - side : first] += 1
    expected = reference.mfas_select(score, reference.Growth(top, shifted=False)).bool()
    assert torch.equal(select_patches(score, top), expected)
    assert expected[:, -1].sum() > expected[:, 0].sum()


def test_classifier_of_another_vocabulary_starts_fresh(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    assert torch.equal(load_head("egovlpv2", checkpoint).projector_2.weight, checkpoint.tensors["projector_2.weight"])
    assert load_head("egovlpv2", checkpoint, answers=11).projector_2.weight.shape == (11, 11)


def test_checkpoints_that_do_not_fit_the_head_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    bare = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("projector")}
    pretrained = Checkpoint(checkpoint.path, "state_dict", bare)
    with pytest.raises(CheckpointError, match="has no classifier"):
        load_head("egovlpv2", pretrained)
    assert load_head("egovlpv2", pretrained, answers=5).projector_1.weight.shape == (5, 128)
    with pytest.raises(ValueError, match="arch is 'egovlp', which has no fused half"):
        load_head("egovlp", checkpoint)
    lacking = {name: t for name, t in checkpoint.tensors.items() if not name.endswith("qkv_i2t.weight")}
    with pytest.raises(CheckpointError, match=r"is missing video_model\.blocks\.2\.attn\.qkv_i2t\.weight"):
        load_head("egovlpv2", Checkpoint(checkpoint.path, "bare", lacking))
    with pytest.raises(CheckpointError, match="EgoVLP checkpoint was found where EgoVLPv2 is expected"):
        load_head("egovlpv2", tiny(tmp_path, "egovlp"))


def test_inputs_of_another_network_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    tokens, states, mask = _inputs(checkpoint, "egovlpv2")
    with pytest.raises(ValueError, match="text_states has 64 channels; expected 128, the width of"):
        load_head("egovlpv2", checkpoint)(tokens, states[..., :64], mask)
    with pytest.raises(ValueError, match="tokens have no coarse saliency"):
        load_head("mfas", checkpoint)(tokens, states, mask)


def _published_logits(network: str, variant: str, tokens: PatchTokens) -> Tensor:
    checkpoint, expected = formula_checkpoint(network), recorded(network)
    states = load_text_encoder(network, checkpoint, 6)(expected["ids"], expected["am"])
    head = load_head(network, checkpoint, variant=variant)
    with torch.inference_mode():
        return head(tokens, states, expected["am"], torch.zeros(2, dtype=torch.long))


@pytest.mark.slow
def test_egovlpv2_gives_the_published_logits() -> None:
    logits = _published_logits("egovlpv2", "paper", published_fused6())
    assert (logits - recorded("egovlpv2")["logits"]).abs().max() < 1e-3


@pytest.mark.slow
def test_mfas_as_released_gives_the_published_score_mask_and_logits() -> None:
    tokens = load_video_encoder("mfas", formula_checkpoint("mfas"), 16, 6, variant="released")(dev_frames(16))
    logits = _published_logits("mfas", "released", tokens)
    expected = recorded("mfas")
    fused_in = sequence(tokens)[:, expected["positions"]].expand(2, -1, -1)
    assert (fused_in - expected["tokens_before_fusion"]).norm() < 1e-4 * expected["tokens_before_fusion"].norm()
    score = score_patches(tokens.saliency, tokens.coarse_saliency)
    torch.testing.assert_close(score.expand(2, -1, -1), expected["score"], atol=1e-7, rtol=1e-5)
    kept = F.pad(select_patches(score, 1).flatten(1).float(), (1, 0), value=1.0)
    assert torch.equal(kept.expand(2, -1), expected["mask"])
    assert (logits - expected["logits"]).abs().max() < 1e-3
