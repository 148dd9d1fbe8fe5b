"""The head's parts: whitening absorbed exactly, prior, merge, and every selection switch."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from egopatch.configs.schema import ConfigError, HeadConfig, TrainConfig
from egopatch.features import PatchTokens
from egopatch.features.values.spec import keep_count
from egopatch.train.data.batch import Batch
from egopatch.train.heads import PSA, Pooled, QuestionOnly, Sizes
from egopatch.train.heads.common.attention import Attention
from egopatch.train.heads.common.question import QuestionReader, Whitening, absorb_key
from egopatch.train.heads.psa.coarse import CoarseLevel, kernel_width
from egopatch.train.heads.psa.prior import spatial_prior
from egopatch.train.ops.philox import Draw
from egopatch.train.steps.stacked_heads import StackedHeads

SIZES = Sizes(frames=3, grid=(5, 7), patches=35, width=32, text_width=24, answers=9)
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
        stored=tokens,
        clip_rows=None,
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
    head.measure(batch.tokens)
    return head.eval()


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 1.0])
def test_psa_keeps_the_rounded_up_share_of_each_frame(ratio: float) -> None:
    logits, kept = make(ratio=ratio).answer(make_batch())
    k = math.ceil(ratio * 35)
    assert logits.shape == (11, 9)
    assert kept.shape == (11, 3, 35)
    assert bool((kept.sum(dim=-1) == k).all())


def test_rounding_noise_does_not_add_a_patch() -> None:
    assert keep_count(0.07, 100) == 7
    assert keep_count(0.55, 100) == 55
    assert keep_count(0.25, 49) == 13
    assert keep_count(1e-9, 49) == 1


def test_question_scores_make_the_selection_depend_on_the_question() -> None:
    batch = make_batch()
    batch = dataclasses.replace(batch, clip_index=torch.zeros_like(batch.clip_index))
    with_question = make(scores=("question",)).answer(batch)[1]
    assert len(with_question.unique(dim=0)) > 1
    for scores in (("saliency",), ("prior",), ("saliency", "prior")):
        assert len(make(scores=scores).answer(batch)[1].unique(dim=0)) == 1


def test_saliency_alone_keeps_the_most_salient() -> None:
    batch = make_batch()
    kept = make(scores=("saliency",)).answer(batch)[1]
    saliency = batch.tokens.saliency[batch.clip_index]
    assert torch.equal(kept, saliency >= saliency.topk(9, dim=-1).values[..., -1:])


def test_prior_alone_keeps_the_region() -> None:
    kept = make(scores=("prior",), ratio=0.1).answer(make_batch())[1]
    prior = spatial_prior(SIZES.grid, "region").flatten()
    assert bool((prior.expand_as(kept)[kept] > 0.999).all())


def test_random_scores_differ_by_clip_and_follow_the_key() -> None:
    head = make(scores=("random",)).train()
    batch = make_batch()
    _, kept = head.answer(batch)
    assert len(kept.flatten(1).unique(dim=0)) > 1
    assert torch.equal(kept, head.answer(batch)[1])
    head.random.draw = Draw((7,))
    assert not torch.equal(kept, head.answer(batch)[1])
    assert not {"selector.weight", "prior", "saliency_weight"} & set(head.state_dict())


def test_all_keeps_every_patch_whatever_the_ratio() -> None:
    head = make(scores=("all",), ratio=0.1)
    assert bool(head.answer(make_batch())[1].all())
    assert not {"selector.weight", "prior", "saliency_weight"} & set(head.state_dict())


@pytest.mark.parametrize("shape", ["centre", "flat"])
def test_prior_starts_in_the_configured_shape(shape: str) -> None:
    prior = make(prior=shape).prior.detach().view(SIZES.grid)
    assert torch.equal(prior, spatial_prior(SIZES.grid, shape))  # type: ignore[arg-type]
    highest = divmod(int(prior.argmax()), SIZES.grid[1])
    assert highest == ((3, 3) if shape == "centre" else (0, 0))
    assert bool(prior.any()) == (shape == "centre")
    assert not make(prior_learned=False).prior.requires_grad


def test_saliency_starts_at_its_weight() -> None:
    light, heavy = (make(scores=("prior", "saliency"), saliency_weight=weight) for weight in (0.0, 50.0))
    by_prior, by_saliency = (make(scores=(score,)).answer(make_batch())[1] for score in ("prior", "saliency"))
    assert torch.equal(light.answer(make_batch())[1], by_prior)
    assert torch.equal(heavy.answer(make_batch())[1], by_saliency)


def test_growth_selects_within_a_region_that_only_grows() -> None:
    head = make(growth=True, ratio=1.0, scores=("saliency",))
    batch = make_batch()
    region = head.grown_region(batch.tokens.saliency, None)
    start = (spatial_prior(SIZES.grid, "region") > 0.5).flatten()
    assert bool(region[:, 0][:, start].all())
    assert bool((region[:, 1:] | ~region[:, :-1]).all())
    assert region[:, -1].sum() > start.sum() * len(region)
    outside = batch.tokens.patches.clone()
    outside[~region] = 9.0
    changed = batch.with_tokens(dataclasses.replace(batch.tokens, patches=outside))
    fine = make(growth=True, ratio=1.0, scores=("saliency",), coarse=False)
    assert torch.equal(fine(batch), fine(changed))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_growth_works_on_frames_with_very_few_patches(grid: tuple[int, int]) -> None:
    saliency = torch.randn(2, 3, grid[0] * grid[1], generator=torch.Generator().manual_seed(0))
    head = PSA(dataclasses.replace(CONFIG, growth=True), dataclasses.replace(SIZES, grid=grid))
    region = head.grown_region(saliency, None)
    assert bool(region[..., (spatial_prior(grid, "region") > 0.5).flatten()].all())
    if len(saliency[0, 0]) <= 2:  # every patch is one of the best three and touches the region
        assert bool(region.all())


@pytest.mark.parametrize("level", ["patch", "frame", "video"])
def test_a_level_without_question_guidance_has_fewer_parameters(level: str) -> None:
    left = tuple(name for name in ("patch", "frame", "video") if name != level)
    head, whole = make(levels=left), make()
    assert sum(p.numel() for p in head.parameters()) < sum(p.numel() for p in whole.parameters())
    assert head(make_batch()).shape == (11, 9)


def test_where_when_and_what_have_separate_readers() -> None:
    batch = make_batch()
    assert set(make().readers) == {"where", "when"}
    assert set(make(readers=1).readers) == set()
    assert set(make(levels=("patch", "video")).readers) == {"where"}
    assert set(make(levels=("frame",), scores=("prior",), coarse=False).readers) == {"when"}
    head = make()
    kept = head.answer(batch)[1]
    for name, moves in (("when", False), ("where", True)):
        changed = make()
        nn.init.normal_(changed.readers[name].score.weight)
        logits, other = changed.answer(batch)
        assert not torch.allclose(logits, head(batch))
        assert torch.equal(other, kept) != moves


def test_attention_is_uneven_from_the_start() -> None:
    """With uniform attention, a head needs hundreds of steps before it learns anything."""
    head, batch = make(), make_batch()
    question = head.readers["where"](batch.states, batch.mask)
    queries = absorb_key(head.query(question), head.key, head.heads)
    logits = torch.einsum("uhd,ctnd->uhctn", queries, head.whiten(batch.tokens.patches))
    assert 0.3 < logits.detach().std(dim=-1).mean() < 3


def test_without_time_the_order_of_frames_does_not_matter() -> None:
    batch = make_batch()
    backwards = {name: t if name == "cls" else t.flip(1) for name, t in batch.tokens.tensors().items()}
    turned = batch.with_tokens(PatchTokens(**backwards))
    assert torch.allclose(make(time=False)(batch), make(time=False)(turned), atol=1e-4)
    assert not torch.allclose(make()(batch), make()(turned), atol=1e-4)


@pytest.mark.parametrize(("frames", "taken"), [(1, (1,)), (2, (0, 2)), (3, (0, 1, 2)), (None, (0, 1, 2))])
def test_frames_are_spread_evenly(frames: int | None, taken: tuple[int, ...]) -> None:
    head, batch = make(frames=frames), make_batch()
    assert head.frame_indices == taken
    other = batch.tokens.patches.clone()
    unread = [t for t in range(3) if t not in taken]
    other[:, unread] = 9.0
    changed = batch.with_tokens(dataclasses.replace(batch.tokens, patches=other))
    assert torch.equal(head(batch), head(changed))
    with pytest.raises(ConfigError, match=r"head\.frames is 4 but the store has 3"):
        make(frames=4)


def test_every_parameter_learns() -> None:
    head = make().train()
    nn.functional.cross_entropy(head(make_batch()), make_batch().answers).backward()
    idle = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_disabled_parts_are_not_built_or_not_trained() -> None:
    assert make(coarse=False).coarse is None
    fixed = make(merge=False).coarse
    assert fixed is not None
    assert not fixed.gate.requires_grad


def test_region_prior_on_the_published_grid() -> None:
    expected = torch.zeros(14, 14)
    expected[4:14, 2:12] = 1
    assert torch.allclose(spatial_prior((14, 14), "region"), expected, atol=1e-5)
    small = spatial_prior((7, 7), "region")
    assert torch.allclose(small.sum() * 4, expected.sum(), atol=1e-4)


def test_merge_starts_as_the_mean_and_ignores_missing_patches() -> None:
    level = CoarseLevel(SIZES, 16, 2, learned=True, implementation="reference")
    x = torch.randn(2, 3, 35, SIZES.width)
    merged = level.merge(x)
    assert merged.shape == (2, 3, 3 * 4, SIZES.width)
    grid = x.view(2, 3, 5, 7, -1)
    assert torch.allclose(merged[:, :, 0], grid[:, :, :2, :2].mean(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(merged[:, :, -1], grid[:, :, 4, 6], atol=1e-5)


def test_padding_channels_of_merged_patches_change_nothing() -> None:
    """On a GPU, merged patches are padded to a multiple of 64 channels."""
    head, batch = make(), make_batch()
    assert head.coarse is not None
    merged = head.coarse.derive(batch.tokens.patches, None)
    found = []
    for tokens in (merged, nn.functional.pad(merged, (0, kernel_width(SIZES.width) - merged.shape[-1]))):
        head.zero_grad()
        logits = head(dataclasses.replace(batch, derived=tokens))
        logits.sin().sum().backward()
        found.append([logits, *(p.grad for p in head.parameters() if p.grad is not None)])
    for plain, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, plain)


def test_whitening_equalises_directions_and_is_absorbed_exactly() -> None:
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(-2, 1, 16)) + 5
    whiten = Whitening(16, shrinkage=0.0)
    whiten.measure(x)
    assert torch.allclose(torch.cov(whiten(x).T), torch.eye(16), atol=1e-2)
    whiten = Whitening(16, shrinkage=2.0)
    whiten.measure(x)
    query = torch.randn(16)
    difference = whiten(x) @ query - x @ whiten.absorb(query)
    assert torch.allclose(difference, difference.mean().expand(500), atol=1e-3)


def test_whitening_can_be_measured_on_one_sample() -> None:
    whiten = Whitening(4, shrinkage=0.3)
    whiten.measure(torch.ones(1, 4))
    assert whiten(torch.ones(2, 4)).tolist() == [[0] * 4] * 2
    assert whiten(torch.zeros(1, 4)).isfinite().all()
    config = dataclasses.replace(CONFIG, scores=("saliency",), ratio=0.01)
    head, tokens = PSA(config, dataclasses.replace(SIZES, frames=1)), make_batch().tokens
    head.measure(PatchTokens(cls=tokens.cls[:1], patches=tokens.patches[:1, :1], saliency=tokens.saliency[:1, :1]))
    assert all(buffer.isfinite().all() for buffer in head.buffers() if buffer.is_floating_point())


def test_padding_of_the_text_changes_nothing() -> None:
    torch.manual_seed(0)
    reader = QuestionReader(24, 16, 2, dropout=0.0)
    states, mask = torch.randn(3, 6, 24), torch.arange(6) < torch.tensor([[2], [6], [4]])
    other = torch.where(mask[..., None], states, torch.full_like(states, 7.0))
    assert torch.equal(reader(states, mask), reader(other, mask))


@pytest.mark.parametrize("make_head", [PSA, Attention, Pooled, QuestionOnly])
def test_a_question_gets_the_same_logits_alone_and_in_a_batch(make_head: type[nn.Module]) -> None:
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


def test_training_on_a_derived_store_does_not_map_kept_patches_to_the_grid() -> None:
    """Only evaluation reads them; in training that would be three more launches a step."""

    class Scatters(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += op is torch.ops.aten.scatter.src
            return op(*args, **(kwargs or {}))

    head, batch = make(), make_batch()
    places = torch.rand(4, 3, 35).argsort(dim=-1).to(torch.int16)
    derived = batch.with_tokens(PatchTokens(**batch.tokens.tensors(), positions=places))
    with Scatters() as evaluated:
        logits, _ = head.answer(derived)
    with Scatters() as trained:
        assert torch.equal(head(derived), logits)
    assert (evaluated.count, trained.count) == (1, 0)


@pytest.mark.parametrize("head", [{}, {"growth": True}, {"frames": 2}, {"scores": ("random",)}])
@pytest.mark.parametrize("ratios", [(0.25,), (0.1, 0.5)])
def test_reading_stored_tokens_in_place_gives_the_same_bits(head: dict[str, object], ratios: tuple[float, ...]) -> None:
    batch, derived = make_batch(), "growth" not in head
    g = torch.Generator().manual_seed(7)
    rows = torch.tensor([5, 0, 6, 2])
    stored = {}
    for name, tensor in batch.tokens.tensors().items():
        stored[name] = torch.full((7, *tensor.shape[1:]), torch.nan, dtype=tensor.dtype)
        stored[name][rows] = tensor
    scale = torch.rand(7, 3, 35, generator=g)
    places = torch.rand(7, 3, 35, generator=g).argsort(dim=-1).to(torch.int16)
    kept = PatchTokens(**stored, scale=scale, positions=places if derived else None)
    in_place = dataclasses.replace(batch, stored=kept, clip_rows=rows)
    copied = batch.with_tokens(in_place.tokens)
    assert copied.stored is not None
    assert len(copied.stored.cls) == 4
    config = dataclasses.replace(CONFIG, **head)  # type: ignore[arg-type]
    learned = []
    for given in (in_place, copied):
        heads = []
        for ratio in ratios:
            torch.manual_seed(0)
            heads.append(PSA(dataclasses.replace(config, ratio=ratio), SIZES))
        stack = StackedHeads(heads, [0] * len(ratios), TrainConfig(), 20, torch.device("cpu"))
        told = [step.values.tolist() for _ in range(3) if (step := stack.learn(given)) is not None]
        assert len(told) == 3
        learned.append((told, *stack.answer(given, 0)))
    (told, classes, masks), (told_of_copy, classes_of_copy, masks_of_copy) = learned
    assert told == told_of_copy
    assert torch.equal(classes, classes_of_copy)
    assert torch.equal(masks, masks_of_copy)


def test_absorbed_maps_stay_in_float32_under_autocast() -> None:
    head, batch = make(), make_batch()
    question = head.read(batch.states, batch.mask).detach()

    def maps() -> list[torch.Tensor]:
        queries = absorb_key(question, head.key, head.heads)
        return [queries, head.whiten.absorb(queries), *head.whiten.then(head.value)]

    expected = maps()
    with torch.autocast("cpu", torch.bfloat16):
        assert (question @ question.T).dtype == torch.bfloat16
        found = maps()
        assert head.whiten.absorb(question.bfloat16() @ head.key.weight).dtype == torch.float32
    for here, there in zip(found, expected, strict=True):
        assert torch.equal(here, there)
