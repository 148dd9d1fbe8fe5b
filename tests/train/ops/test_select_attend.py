"""The contract of `select_attend`, on its reference implementation."""

import math
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from egopatch.features.common import machine
from egopatch.train.ops.select_attend import SelectAttendOutput, choose_implementation, reference, select_attend
from tests.train.ops.cases import Case, assert_as_exact_as, gradients, make_case, oracle

SHAPES = [  # clips, questions, frames, patches, width, heads
    (3, 7, 2, 33, 96, 2),
    (4, 11, 3, 49, 128, 4),
    (2, 3, 2, 196, 768, 4),
    (5, 1, 1, 5, 16, 1),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8]


def run(case: Case, leaves: list[Tensor], k: int) -> SelectAttendOutput:
    return select_attend(case.tokens, case.clip_index, *leaves, k, case.scale)


def check(case: Case, k: int) -> None:
    """Outputs and every gradient against the loops in float64, within twice the specification's own error."""
    exact_leaves, eager_leaves, leaves = case.leaves(torch.float64), case.leaves(), case.leaves()
    exact_case = Case(case.tokens, case.clip_index, *exact_leaves, case.scale)
    out = run(case, leaves, k)
    exact, kept = oracle(exact_case, k)
    eager = reference.specification(case.tokens, case.clip_index, *eager_leaves, k, case.scale)
    assert torch.equal(out.kept, kept)
    assert torch.equal(eager[2], kept)
    exact_all = [*exact, *gradients(*exact, exact_leaves)]
    eager_all = [*eager[:2], *gradients(*eager[:2], eager_leaves)]
    actual_all = [*out[:2], *gradients(*out[:2], leaves)]
    names = ["pooled", "lse", "grad queries", "grad selector", "grad bias"]
    for name, a, e, x in zip(names, actual_all, eager_all, exact_all, strict=True):
        assert_as_exact_as(a, e, x, name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_select_attend_agrees_with_the_loops(shape: tuple[int, ...], share: float) -> None:
    check(make_case(*shape), max(1, math.ceil(share * shape[3])))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [7, 30])
def test_every_token_dtype_agrees_with_the_loops(dtype: torch.dtype, scaled: bool, k: int) -> None:
    check(make_case(3, 8, 2, 33, 96, 2, dtype, scaled), k)


@pytest.mark.parametrize("k", [3, 15])
def test_gradients_match_finite_differences(k: int) -> None:
    case = make_case(2, 3, 2, 17, 16, 2, scaled=True)
    leaves = case.leaves(torch.float64)

    def outputs(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out = run(case, list(inputs), k)
        return out.pooled, out.lse

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_queries_give_outputs_in_their_dtype(dtype: torch.dtype) -> None:
    case = make_case(2, 5, 2, 33, 96, 2, torch.float16)
    rounded = Case(case.tokens, case.clip_index, case.queries.to(dtype), case.selector.to(dtype), case.bias, case.scale)
    leaves = [t.detach().requires_grad_() for t in (rounded.queries, rounded.selector, rounded.bias)]
    out = run(rounded, leaves, 9)
    exact, kept = oracle(rounded, 9)
    eager = reference.specification(case.tokens, case.clip_index, *leaves, 9)
    assert (out.pooled.dtype, out.lse.dtype) == (dtype, torch.float32)
    assert torch.equal(out.kept, kept)
    assert_as_exact_as(out.pooled, eager[0], exact[0], "pooled")
    assert_as_exact_as(out.lse, eager[1], exact[1], "lse")
    assert [g.dtype for g in gradients(out.pooled, out.lse, leaves)] == [dtype, dtype, torch.float32]


@pytest.mark.parametrize("k", [7, 30])
def test_autocast_rounds_nothing(k: int) -> None:
    case = make_case(3, 8, 2, 33, 96, 2, torch.float16, scaled=True)
    leaves = case.leaves()
    plain = run(case, leaves, k)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(case, leaves, k)
        found = gradients(cast.pooled, cast.lse, leaves)
    for one, other in zip((*cast, *found), (*plain, *gradients(plain.pooled, plain.lse, leaves)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_equal_scores_go_to_the_lowest_patch(k: int) -> None:
    case = make_case(2, 5, 2, 13, 16, 2)
    flat = Case(case.tokens, case.clip_index, case.queries, case.selector * 0, case.bias * 0, None)
    assert torch.equal(run(flat, flat.leaves(), k).kept, torch.arange(k).expand(5, 2, k))
    check(flat, k)


def test_a_tie_at_the_threshold_keeps_the_lowest_patch() -> None:
    case = make_case(1, 1, 1, 6, 16, 1)
    bias = torch.tensor([[[1.0, 3.0, 1.0, 2.0, 1.0, 0.0]]])
    tied = Case(case.tokens, case.clip_index, case.queries, case.selector * 0, bias, None)
    assert run(tied, tied.leaves(), 4).kept.tolist() == [[[0, 1, 2, 3]]]
    assert run(tied, tied.leaves(), 3).kept.tolist() == [[[0, 1, 3]]]


@pytest.mark.parametrize("k", [3, 30])
def test_rows_without_a_finite_score_give_zeros_and_no_gradient(k: int) -> None:
    case = make_case(3, 8, 2, 33, 16, 2)
    case.bias[1] = -torch.inf
    case.bias[2, 0, 2:] = -torch.inf
    case.clip_index[:3] = torch.tensor([0, 1, 2])
    leaves = case.leaves()
    out = run(case, leaves, k)
    empty = case.clip_index == 1
    assert (out.pooled[empty] == 0).all()
    assert (out.lse[empty] == -torch.inf).all()
    grads = gradients(out.pooled, out.lse, leaves)
    assert (grads[0][empty] == 0).all()
    assert (grads[2][1] == 0).all()
    check(case, k)


def test_unevenly_shared_and_absent_clips_agree_with_the_loops() -> None:
    case = make_case(6, 23, 2, 20, 32, 2)
    case.clip_index[:] = torch.tensor([4] * 15 + [0, 2, 2, 4, 0, 5, 2, 4])
    check(case, 5)
    leaves = case.leaves()
    out = run(case, leaves, 5)
    assert (gradients(out.pooled, out.lse, leaves)[2][[1, 3]] == 0).all()


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(7, 29, 5, 33, 64, 3)
    whole = run(case, case.leaves(), 8)
    monkeypatch.setattr(reference, "CHUNK_BYTES", 3 * 33 * 64 * 4)
    cut = run(case, case.leaves(), 8)
    assert torch.equal(whole.kept, cut.kept)
    check(case, 8)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_gathered_and_dense_products_agree_with_the_loops(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "DENSE_SHARE", share)
    check(make_case(3, 10, 2, 21, 32, 3, torch.float16, scaled=True), 6)


def test_strided_tokens_give_the_results_of_contiguous_ones() -> None:
    case = make_case(3, 6, 4, 33, 96, 2)
    wide = torch.randn(6, 4, 35, 160)
    view = wide[::2, :, 1:34, 16:112]
    view.copy_(case.tokens)
    out = select_attend(view, case.clip_index, case.queries, case.selector, case.bias, 9)
    assert all(torch.equal(a, b) for a, b in zip(out, run(case, case.leaves(), 9), strict=True))


def test_repeats_are_bit_equal() -> None:
    case = make_case(5, 40, 3, 49, 64, 4)
    runs = []
    for _ in range(2):
        leaves = case.leaves()
        out = run(case, leaves, 13)
        runs.append([*out, *gradients(out.pooled, out.lse, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_zero_questions_give_empty_outputs() -> None:
    case = make_case(2, 0, 3, 9, 16, 2)
    leaves = case.leaves()
    out = run(case, leaves, 4)
    assert [tuple(t.shape) for t in out] == [(0, 3, 2, 16), (0, 3, 2), (0, 3, 4)]
    assert (gradients(out.pooled, out.lse, leaves)[2] == 0).all()


def test_gradients_flow_from_lse_or_pooled_alone() -> None:
    case = make_case(2, 4, 2, 17, 16, 2)
    leaves = case.leaves()
    (grad,) = torch.autograd.grad(run(case, leaves, 5).lse.sum(), leaves[:1])
    assert grad.abs().sum() > 0
    (grad,) = torch.autograd.grad(run(case, leaves, 5).pooled.sum(), leaves[2:])
    assert grad.shape == case.bias.shape


def test_kept_is_not_differentiable() -> None:
    case = make_case(2, 4, 2, 17, 16, 2)
    out = run(case, case.leaves(), 5)
    assert out.pooled.requires_grad
    assert not out.kept.requires_grad
    assert out.kept.dtype == torch.int64


def arguments() -> dict[str, object]:
    case = make_case(2, 3, 2, 9, 16, 2)
    return {**vars(case), "k": 4}


WRONG = {
    "tokens-shape": ({"tokens": torch.zeros(2, 9, 16)}, r"tokens has shape \(2, 9, 16\); expected \[clips, frames"),
    "tokens-dtype": ({"tokens": torch.zeros(2, 2, 9, 16).double()}, r"tokens is torch.float64; expected one of"),
    "tokens-grad": ({"tokens": torch.zeros(2, 2, 9, 16).requires_grad_()}, r"tokens requires a gradient.*detach"),
    "index-dtype": ({"clip_index": torch.zeros(3)}, r"clip_index is torch.float32; expected int32 or int64"),
    "index-shape": ({"clip_index": torch.zeros(3, 1).long()}, r"clip_index has shape \(3, 1\); expected \[questions\]"),
    "index-high": ({"clip_index": torch.tensor([0, 2, 1])}, r"clip_index holds 2; expected 0 to 1"),
    "index-low": ({"clip_index": torch.tensor([0, -1, 1])}, r"clip_index holds -1; expected 0 to 1"),
    "queries": ({"queries": torch.zeros(3, 2, 8)}, r"queries has shape \(3, 2, 8\); expected \[3, heads, 16\]"),
    "selector": ({"selector": torch.zeros(2, 16)}, r"selector has shape \(2, 16\); expected \(3, 16\)"),
    "selector-dtype": ({"selector": torch.zeros(3, 16).int()}, r"selector is torch.int32; expected float16"),
    "bias": ({"bias": torch.zeros(2, 9)}, r"bias has shape \(2, 9\); expected \(2, 2, 9\)"),
    "scale": ({"scale": torch.zeros(2, 2, 1)}, r"scale has shape \(2, 2, 1\); expected \(2, 2, 9\)"),
    "rows-dtype": ({"clip_rows": torch.zeros(2)}, r"clip_rows is torch.float32; expected int32 or int64"),
    "rows-shape": ({"clip_rows": torch.zeros(2, 1).long()}, r"clip_rows has shape \(2, 1\); expected \[clips\]"),
    "rows-high": ({"clip_rows": torch.tensor([0, 2])}, r"clip_rows holds 2; expected 0 to 1"),
    "rows-bias": ({"clip_rows": torch.zeros(3).long()}, r"bias has shape \(2, 2, 9\); expected \(3, 2, 9\)"),
    "device": ({"bias": torch.zeros(2, 2, 9, device="meta")}, r"bias is on meta; expected cpu, where tokens is"),
    "k-low": ({"k": 0}, r"k is 0; expected 1 to 9"),
    "k-high": ({"k": 10}, r"k is 10; expected 1 to 9"),
    "implementation": ({"implementation": "fast"}, r"implementation is 'fast'; expected 'auto', 'reference' or"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong: str) -> None:
    change, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        select_attend(**{**arguments(), **change})  # type: ignore[arg-type]


def test_auto_takes_the_reference_on_a_cpu() -> None:
    tokens = torch.zeros(1, 1, 4, 16)
    assert choose_implementation(tokens, torch.float32, "auto") == ("reference", "tokens are on cpu")
    assert choose_implementation(tokens, torch.float32, "reference") == ("reference", "as requested")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("patches", "width", "dtype", "chosen", "why"),
    [
        (1024, 1024, torch.float32, "triton", "tokens are on cuda:0"),
        (1025, 16, torch.float32, "reference", "tokens has 1025 patches; expected at most 1024"),
        (4, 1552, torch.float32, "reference", "tokens has 1552 channels; expected a multiple of 16 up to 1536"),
        (4, 24, torch.float32, "reference", "tokens has 24 channels; expected a multiple of 16 up to 1536"),
        (4, 16, torch.float64, "reference", "queries is torch.float64; expected at most float32"),
    ],
)
def test_auto_takes_triton_on_a_gpu_or_warns_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, patches: int, width: int, dtype: torch.dtype, chosen: str, why: str
) -> None:
    """Uses fake tensors that only claim to be on a GPU, an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(machine, "triton_fault", lambda _: None)
    with FakeTensorMode():
        gpu = torch.device("cuda", 0)
        tokens = torch.empty(1, 1, patches, width, device=gpu)
        assert choose_implementation(tokens, dtype, "auto") == (chosen, why)
        inputs = [torch.empty(shape, dtype=dtype, device=gpu) for shape in ((2, 3, width), (2, width), (1, 1, patches))]
        warning = pytest.warns(UserWarning, match=f"runs its slower reference on a GPU: {why}")
        with warning if chosen == "reference" else nullcontext():
            out = select_attend(tokens, torch.zeros(2, dtype=torch.int64, device=gpu), *inputs, 2)
        assert out.pooled.shape == (2, 1, 3, width)


@pytest.mark.parametrize("share", [0.2, 0.7])
@pytest.mark.parametrize("scaled", [False, True])
def test_tokens_selected_by_clip_rows_are_read_in_place(share: float, scaled: bool) -> None:
    """`clip_rows` gives what gathering the clips first gives, bit for bit, and gradients of the batch's bias alone."""
    whole = make_case(9, 12, 3, 33, 64, 2, torch.float16, scaled)
    rows = torch.tensor([7, 0, 3, 3])
    scale = None if whole.scale is None else whole.scale[rows]
    gathered = Case(whole.tokens[rows], whole.clip_index % 4, whole.queries, whole.selector, whole.bias[rows], scale)
    k = math.ceil(share * 33)
    leaves, again = gathered.leaves(), gathered.leaves()
    out = run(gathered, leaves, k)
    placed = select_attend(whole.tokens, gathered.clip_index, *again, k, whole.scale, clip_rows=rows)
    assert all(torch.equal(a, b) for a, b in zip(out, placed, strict=True))
    for a, b in zip(gradients(*out[:2], leaves), gradients(*placed[:2], again), strict=True):
        assert torch.equal(a, b)
    eager = reference.specification(whole.tokens, gathered.clip_index, *again, k, whole.scale, rows)
    assert torch.equal(eager[2], out.kept)
