"""The head's parts: whitening absorbed exactly, prior, merge, and every selection switch."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from configs.schema import HeadConfig
from features import PatchTokens
from train.batches import Batch
from train.heads import PSA, Pooled, QuestionOnly, Sizes
from train.heads.psa import CoarseLevel, keep_count, region_prior
from train.heads.question import QuestionReader, Whiten

SIZES = Sizes(frames=3, grid=(5, 7), width=32, text_width=24, answers=9)
CONFIG = HeadConfig(width=32, heads=2, ratio=0.25, dropout=0.2)


def make_batch(clips: int = 4, questions: int = 11, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    n = SIZES.grid[0] * SIZES.grid[1]
    tokens = PatchTokens(
        cls=torch.randn(clips, SIZES.width, generator=g),
        patches=torch.randn(clips, SIZES.frames, n, SIZES.width, generator=g).half(),
        saliency=torch.randn(clips, SIZES.frames, n, generator=g),
    )
    texts, length = 5, 6
    return Batch(
        tokens=tokens,
        clip_index=torch.randint(0, clips, (questions,), generator=g),
        states=torch.randn(texts, length, SIZES.text_width, generator=g).half(),
        mask=torch.arange(length) < torch.randint(1, length + 1, (texts, 1), generator=g),
        text_index=torch.randint(0, texts, (questions,), generator=g),
        forms=torch.zeros(questions, dtype=torch.long),
        answers=torch.randint(0, SIZES.answers, (questions,), generator=g),
        rows=torch.arange(questions),
    )


def make(seed: int = 0, **changes: object) -> PSA:
    torch.manual_seed(seed)
    head = PSA(dataclasses.replace(CONFIG, **changes), SIZES)  # type: ignore[arg-type]
    batch = make_batch()
    assert batch.tokens is not None
    head.measure(batch.tokens)
    return head.eval()


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 1.0])
def test_keeps_the_rounded_up_share_of_each_frame(ratio: float) -> None:
    logits, kept = make(ratio=ratio).answer(make_batch())
    k = math.ceil(ratio * 35)
    assert logits.shape == (11, 9)
    assert kept.shape == (11, 3, k)
    assert bool((kept.diff(dim=-1) > 0).all())


def test_rounding_noise_does_not_add_a_patch() -> None:
    assert keep_count(0.07, 100) == 7
    assert keep_count(0.25, 49) == 13
    assert keep_count(1e-9, 49) == 1


def test_question_decides_what_is_kept() -> None:
    batch = make_batch()
    batch = dataclasses.replace(batch, clip_index=torch.zeros_like(batch.clip_index))
    with_question = make(scores=("question",)).answer(batch)[1]
    assert len(with_question.unique(dim=0)) > 1
    for scores in (("saliency",), ("prior",), ("saliency", "prior")):
        assert len(make(scores=scores).answer(batch)[1].unique(dim=0)) == 1


def test_saliency_alone_keeps_the_most_salient() -> None:
    batch = make_batch()
    assert batch.tokens is not None
    kept = make(scores=("saliency",)).answer(batch)[1]
    expected = batch.tokens.saliency[batch.clip_index].topk(9, dim=-1).indices.sort(dim=-1).values
    assert torch.equal(kept, expected)


def test_prior_alone_keeps_the_region() -> None:
    kept = make(scores=("prior",), ratio=0.1).answer(make_batch())[1]
    prior = region_prior(SIZES.grid).flatten()
    assert bool((prior[kept] > 0.999).all())


def test_random_scores_differ_by_clip_and_leave_no_gradient_on_the_selector() -> None:
    head = make(scores=("random",)).train()
    batch = make_batch()
    logits, kept = head.answer(batch)
    assert len(kept.flatten(1).unique(dim=0)) > 1
    logits.sum().backward()
    assert head.selector.weight.grad is None or not head.selector.weight.grad.any()
    assert head.prior.grad is None


def test_every_parameter_learns() -> None:
    head = make().train()
    nn.functional.cross_entropy(head(make_batch()), make_batch().answers).backward()
    idle = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_switched_off_parts_are_gone() -> None:
    assert make(coarse=False).coarse is None
    fixed = make(merge=False).coarse
    assert fixed is not None
    assert not fixed.corner.requires_grad
    assert not fixed.content.requires_grad


def test_region_prior_on_the_published_grid() -> None:
    expected = torch.zeros(14, 14)
    expected[4:14, 2:12] = 1
    assert torch.allclose(region_prior((14, 14)), expected, atol=1e-5)
    small = region_prior((7, 7))
    assert torch.allclose(small.sum() * 4, expected.sum(), atol=1e-4)


def test_merge_is_the_mean_at_first_and_ignores_what_is_not_there() -> None:
    level = CoarseLevel(SIZES, 16, 2, learned=True)
    x = torch.randn(2, 3, 35, SIZES.width)
    merged = level.merge(x, level.content)
    assert merged.shape == (2, 3, 3 * 4, SIZES.width)
    grid = x.view(2, 3, 5, 7, -1)
    assert torch.allclose(merged[:, :, 0], grid[:, :, :2, :2].mean(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(merged[:, :, -1], grid[:, :, 4, 6], atol=1e-5)


def test_whitening_evens_directions_and_is_absorbed_exactly() -> None:
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(-2, 1, 16)) + 5
    whiten = Whiten(16, softness=0.0)
    whiten.measure(x)
    assert torch.allclose(torch.cov(whiten(x).T), torch.eye(16), atol=1e-2)
    whiten = Whiten(16, softness=2.0)
    whiten.measure(x)
    query = torch.randn(16)
    difference = whiten(x) @ query - x @ whiten.absorb(query)
    assert torch.allclose(difference, difference.mean().expand(500), atol=1e-3)


def test_padding_of_the_text_changes_nothing() -> None:
    torch.manual_seed(0)
    reader = QuestionReader(24, 16, 2, dropout=0.0)
    states, mask = torch.randn(3, 6, 24), torch.arange(6) < torch.tensor([[2], [6], [4]])
    other = torch.where(mask[..., None], states, torch.full_like(states, 7.0))
    assert torch.equal(reader(states, mask), reader(other, mask))


@pytest.mark.parametrize("make_head", [PSA, Pooled, QuestionOnly])
def test_a_question_is_answered_alike_alone_and_in_a_batch(make_head: type[nn.Module]) -> None:
    torch.manual_seed(0)
    head = make_head(CONFIG, SIZES).eval()
    batch = make_batch()
    together = head(batch)
    for b in range(3):
        alone = dataclasses.replace(
            batch,
            **{
                name: getattr(batch, name)[b : b + 1]
                for name in ("clip_index", "text_index", "forms", "answers", "rows")
            },
        )
        assert torch.allclose(head(alone)[0], together[b], atol=1e-4)
