"""Stacked heads behave as they do alone: steps, averages, clipping and noise are per head."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from egopatch.configs.schema import HeadConfig, TrainConfig
from egopatch.train.data.batch import Batch
from egopatch.train.heads import PSA, Pooled, QuestionOnly
from egopatch.train.heads.common.noise import Dropout
from egopatch.train.heads.psa.selection import Patches, PatchSelection
from egopatch.train.ops.largest import largest_mask
from egopatch.train.ops.philox import Draw
from egopatch.train.steps import stacked_heads
from egopatch.train.steps.loss import cross_entropy
from egopatch.train.steps.optim import FlatParameters, build_optimiser, learning_rate
from egopatch.train.steps.stacked_heads import StackedHeads, deterministic
from tests.train.test_psa import CONFIG, SIZES, make_batch

TRAIN = TrainConfig(lr=3e-3, warmup=0.0, label_smoothing=0.1)
CPU = torch.device("cpu")


def make_head(config: HeadConfig, seed: int, kind: type = PSA) -> torch.nn.Module:
    torch.manual_seed(seed)
    head = kind(config, SIZES)
    batch = make_batch()
    if hasattr(head, "measure"):
        head.measure(batch.tokens)
    return head


def make(
    ratios: tuple[float, ...], seeds: tuple[int, ...], train: TrainConfig = TRAIN, **changes: object
) -> StackedHeads:
    config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
    heads = [make_head(dataclasses.replace(config, ratio=r), s) for r, s in zip(ratios, seeds, strict=True)]
    return StackedHeads(heads, seeds, train, 20, CPU)


def trace(stack: StackedHeads, batches: int = 6) -> list[list[float]]:
    told = [stack.learn(make_batch(seed=seed)) for seed in range(batches)]
    return [step.values[0].tolist() for step in told if step is not None]


@pytest.mark.parametrize("changes", [{}, {"scores": ("random",)}, {"growth": True}, {"coarse": False}])
def test_stacked_heads_learn_the_same_as_alone(changes: dict[str, object]) -> None:
    ratios, seeds = (0.1, 0.5, 1.0), (3, 3, 4)
    together = make(ratios, seeds, **changes)
    found = torch.tensor(trace(together))
    for member, (ratio, seed) in enumerate(zip(ratios, seeds, strict=True)):
        alone = make((ratio,), (seed,), **changes)
        torch.testing.assert_close(found[:, member], torch.tensor(trace(alone))[:, 0], rtol=1e-4, atol=1e-4)
        classes, kept = alone.answer(make_batch(), 0)
        many, masks = together.answer(make_batch(), 0)
        assert torch.equal(many[member], classes[0])
        assert kept is not None
        assert masks is not None
        assert (masks[member] == kept[0]).float().mean() > 0.99  # near ties may fall either way


def test_unrequested_kept_patches_are_not_copied_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, batch = make((0.1, 0.5), (3, 4)), make_batch()
    classes, kept = stack.answer(batch, 0)
    assert kept is not None
    copied, cpu = [], Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: copied.append(tuple(tensor.shape)) or cpu(tensor))
    again, none = stack.answer(batch, 0, keep_patches=False)
    assert torch.equal(again, classes)
    assert none is None
    assert copied == [(2, len(batch))]


@pytest.mark.parametrize("kind", [Pooled, QuestionOnly])
def test_pooled_and_question_only_heads_stack_too(kind: type) -> None:
    heads = [make_head(CONFIG, seed, kind) for seed in (0, 1)]
    found = trace(StackedHeads(heads, (0, 1), TRAIN, 20, CPU))
    for member in (0, 1):
        alone = trace(StackedHeads([make_head(CONFIG, member, kind)], (member,), TRAIN, 20, CPU))
        assert [step[member] for step in found] == pytest.approx([step[0] for step in alone], rel=1e-4)


@pytest.mark.parametrize("low", [False, True])
def test_dense_selection_of_stacked_heads_matches_select_attend(low: bool) -> None:
    """Outputs and every gradient, with a scale and excluded patches, also under autocast."""
    g = torch.Generator().manual_seed(0)
    batch, ks = make_batch(), (1, 9, 35)
    tokens = batch.tokens.patches
    clips, frames, patches, width = tokens.shape
    scale = torch.rand(clips, frames, patches, generator=g)
    bias = torch.randn(3, clips, frames, patches, generator=g)
    bias[:, :, :, :20] = -torch.inf
    leaves = [torch.randn(3, 11, 2, width, generator=g), torch.randn(3, 11, width, generator=g), bias]
    selection = PatchSelection(1, "reference")
    selection.ks = ks
    stored = Patches(tokens, batch.clip_index, scale, None)
    results = []
    for dense in (True, False):
        queries, selector, prior = (leaf.clone().requires_grad_() for leaf in leaves)
        if dense:
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                parts = selection.for_stacked_heads(stored, queries, selector, prior)
        else:
            of_each = [selection.for_one_head(stored, queries[m], selector[m], prior[m], k) for m, k in enumerate(ks)]
            parts = tuple(torch.stack(part) for part in zip(*of_each, strict=True))
        pooled, lse, kept = parts
        (pooled.sin().sum() + lse.cos().sum()).backward()
        results.append((pooled, lse, kept, queries.grad, selector.grad, prior.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_ties_go_to_the_lowest_patch() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
    assert largest_mask(scores, 2).tolist() == [[False, True, True, False, False], [True, True, False, False, False]]


def with_variants(batch: Batch, paraphrase: Batch, counterfactual: Batch) -> Batch:
    """The batch with the texts of two others."""
    variants = [
        dataclasses.replace(batch, states=other.states, mask=other.mask, text_index=other.text_index)
        for other in (paraphrase, counterfactual)
    ]
    return dataclasses.replace(batch, variants=tuple(variants))


def test_contrast_pulls_a_question_towards_its_paraphrase() -> None:
    train = dataclasses.replace(TRAIN, contrast=2.0)
    batch = make_batch()
    # Equal texts cannot be told apart, so the choice between them costs log 2.
    plain = make((0.5,), (3,)).learn(batch)
    equal = make((0.5,), (3,), train).learn(with_variants(batch, batch, batch))
    assert plain is not None
    assert equal is not None
    assert float(equal.values[0, 0] - plain.values[0, 0]) == pytest.approx(2 * math.log(2), rel=1e-4)
    # Paraphrases are different texts, so the answers have to become alike.
    varied = with_variants(batch, make_batch(seed=1), make_batch(seed=2))
    stack = make((0.5,), (3,), train, dropout=0.0)
    before = stack._contrast(stack.logits(varied, 0)[0], varied, stack.tensors).mean().item()
    for _ in range(20):
        stack.learn(varied)
    assert stack._contrast(stack.logits(varied, 0)[0], varied, stack.tensors).mean().item() < before / 2


@pytest.mark.parametrize("kind", [PSA, Pooled])
def test_stacked_heads_have_the_same_contrast_loss_as_alone(kind: type) -> None:
    train, seeds = dataclasses.replace(TRAIN, contrast=1.0), (3, 4)
    batch = with_variants(make_batch(), make_batch(seed=1), make_batch(seed=2))
    together = StackedHeads([make_head(CONFIG, seed, kind) for seed in seeds], seeds, train, 20, CPU)
    found = [together.learn(batch) for _ in range(3)]
    for member, seed in enumerate(seeds):
        alone = StackedHeads([make_head(CONFIG, seed, kind)], [seed], train, 20, CPU)
        for step in found:
            expected = alone.learn(batch)
            assert step is not None
            assert expected is not None
            assert float(step.values[0, member]) == pytest.approx(float(expected.values[0, 0]), rel=1e-4)


def test_accumulated_batches_make_one_step() -> None:
    accumulate = make((0.5,), (0,), dataclasses.replace(TRAIN, accumulate=2), dropout=0.0)
    first, second = make_batch(seed=1), make_batch(seed=2)
    assert accumulate.learn(first) is None
    step = accumulate.learn(second)
    assert step is not None
    loss = 0.0
    for batch in (first, second):
        alone = make((0.5,), (0,), dropout=0.0)
        told = alone.learn(batch)
        assert told is not None
        loss += float(told.values[0, 0]) / 2
    assert float(step.values[0, 0]) == pytest.approx(loss, rel=1e-5)
    assert accumulate.step == 1
    # An epoch's last batch makes a step with what there is.
    assert accumulate.learn(first, last=True) is not None


def test_accumulated_batches_have_new_noise_in_every_step() -> None:
    still = make((0.5,), (0,), dataclasses.replace(TRAIN, lr=1e-30, accumulate=2))  # losses differ by noise alone
    steps = [still.learn(make_batch()) for _ in range(8)]
    assert len({float(step.values[0, 0]) for step in steps if step is not None}) == 4


def test_the_moving_average_follows_the_weights_and_gives_the_answers() -> None:
    averaged, plain = make((0.5,), (0,), dataclasses.replace(TRAIN, ema=0.5)), make((0.5,), (0,))
    name = "classify.5.weight"
    expected = plain.weights(0)[name].clone()
    for seed in range(4):
        averaged.learn(make_batch(seed=seed))
        plain.learn(make_batch(seed=seed))
        expected.lerp_(plain.weights(0)[name], 0.5)
    torch.testing.assert_close(averaged.weights(0)[name], expected)
    weights = averaged.weights(0)
    plain.load_weights(0, weights)
    assert torch.equal(averaged.answer(make_batch(), 0)[0], plain.answer(make_batch(), 0)[0])


def test_gradients_are_clipped_per_head() -> None:
    stack = make((0.5, 0.5), (0, 0))
    for flat in stack.parameters.flats:
        flat.grad = torch.ones_like(flat)
        flat.grad[1] *= 1e-4
    norms = stack._clip_gradients(1)
    of_first, of_second = (
        sum(flat.grad[member].square().sum() for flat in stack.parameters.flats if flat.grad is not None).sqrt()
        for member in (0, 1)
    )
    assert float(of_first) == pytest.approx(1, rel=1e-3)
    assert float(of_second) == pytest.approx(float(norms[1]), rel=1e-3)
    assert norms[1] < 1


@pytest.mark.parametrize("held", [0, 1])
def test_a_loaded_state_continues_exactly(held: int) -> None:
    train = dataclasses.replace(TRAIN, ema=0.9, accumulate=2)
    batches = [make_batch(seed=seed) for seed in range(9)]

    def run(stack: StackedHeads, part: list[Batch]) -> list[float]:
        return [float(told.values[0, 0]) for batch in part if (told := stack.learn(batch)) is not None]

    undisturbed = make((0.25, 0.5), (0, 1), train)
    expected = run(undisturbed, batches)
    stopped, later = make((0.25, 0.5), (0, 1), train), make((0.25, 0.5), (7, 8), train)
    losses = run(stopped, batches[: 4 + held])
    later.seeds = stopped.seeds
    later.load_state({**stopped.state()})
    assert losses + run(later, batches[4 + held :]) == expected
    for name, tensor in undisturbed.weights(1).items():
        assert torch.equal(tensor, later.weights(1)[name]), name


def test_dropout_noise_depends_on_seed_layer_and_position() -> None:
    drop = Dropout(0.5).train()
    x = torch.ones(1000)
    drop.draw = Draw((0,), 1, torch.tensor([2, 0]))
    first = drop(x)
    assert torch.equal(first, drop(x))
    assert abs(float(first.mean()) - 1) < 0.15
    for other in (
        Draw((1,), 1, torch.tensor([2, 0])),
        Draw((0,), 2, torch.tensor([2, 0])),
        Draw((0,), 1, torch.tensor([3, 0])),
    ):
        drop.draw = other
        assert 0.4 < float((drop(x) == first).float().mean()) < 0.6
    assert torch.equal(drop.eval()(x), x)


def test_bfloat16_is_near_float32() -> None:
    low, full = make((0.25,), (0,), dataclasses.replace(TRAIN, dtype="bfloat16")), make((0.25,), (0,))
    one, other = torch.tensor(trace(low)), torch.tensor(trace(full))
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_deterministic_mode_is_set_inside_and_restored_after() -> None:
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        trace(make((0.1, 0.5), (0, 1)), 2)
    assert not torch.are_deterministic_algorithms_enabled()


def test_rate_rises_then_falls_to_zero() -> None:
    train = TrainConfig(lr=1.0, warmup=0.25)
    rates = [learning_rate(step, 20, train) for step in range(20)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert max(rates) == 1.0
    assert 0 < rates[-1] < 0.02


def test_weights_of_another_head_are_refused() -> None:
    stack = make((0.5,), (0,))
    weights: dict[str, Tensor] = dict(stack.weights(0))
    with pytest.raises(ValueError, match="prior is missing"):
        stack.load_weights(0, {name: t for name, t in weights.items() if name != "prior"})
    with pytest.raises(ValueError, match=r"prior is \(3,\), expected \(35,\)"):
        stack.load_weights(0, {**weights, "prior": torch.zeros(3)})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_matches_torch(smoothing: float) -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    answers = torch.tensor([0, 6, 3, 3, 1])
    found = cross_entropy(logits, answers, smoothing)
    expected = torch.stack(
        [torch.nn.functional.cross_entropy(one, answers, label_smoothing=smoothing, reduction="none") for one in logits]
    )
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads)


def test_missing_options_do_not_affect_the_loss() -> None:
    logits = torch.tensor([[[1.0, 2.0, -math.inf]]])
    assert float(cross_entropy(logits, torch.tensor([1]), 0.0)) == pytest.approx(math.log(1 + math.exp(-1)))


def test_flat_parameters_step_like_separate_ones() -> None:
    """AdamW on the flat tensors, against AdamW on the parameters themselves, of which only matrices decay."""
    train = dataclasses.replace(TRAIN, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    shapes = {"scalar": (), "matrix": (3, 5), "bias": (64,), "even": (8, 8)}
    values = {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}
    flat = FlatParameters(values)
    single = {name: value.clone().requires_grad_() for name, value in values.items()}
    matrices, rest = [single["matrix"], single["even"]], [single["scalar"], single["bias"]]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    expected = torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.98), fused=True)
    optimiser = build_optimiser(flat, train)
    assert optimiser is not None
    for _ in range(3):
        for value in single.values():
            value.grad = torch.randn(value.shape, generator=generator)
        for tensor, gradient in zip(flat.flats, flat.flatten({n: v.grad for n, v in single.items()}), strict=True):
            tensor.grad = gradient
        for steps in (optimiser, expected):
            steps.step()
            steps.zero_grad()
    found = flat.views([tensor.detach() for tensor in flat.flats])
    for name, value in single.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=0)
    assert bool((flat.flatten(dict.fromkeys(values))[0] == 0).all())  # no gradient counts as zero
    # The state is saved per parameter, as in earlier versions.
    saved, known = flat.optimiser_state(optimiser)["state"], expected.state_dict()["state"]
    assert saved.keys() == known.keys()
    assert all(torch.equal(saved[i][key], known[i][key]) for i in known for key in known[i])
    again = build_optimiser(flat, train)
    assert again is not None
    flat.load_optimiser_state(again, expected.state_dict())
    for tensor in flat.flats:
        assert all(torch.equal(again.state[tensor][key], value) for key, value in optimiser.state[tensor].items())


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bfloat16_only_on_a_gpu_that_has_it(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked_heads, "has_bfloat16", lambda _: supported)
    heads = StackedHeads.__new__(StackedHeads)
    heads.train, heads.device = TrainConfig(), torch.device("cuda")
    assert heads.low_precision == supported
