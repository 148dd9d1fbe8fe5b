"""Tests of the Triton kernels, forward and backward. `test_triton.py` runs them in Triton's interpreter, in a process
of their own since the interpreter is chosen when the kernels are imported; `test_cuda.py` runs them on a GPU.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.ops.cases import (
    Case,
    assert_as_exact_as,
    assert_same_selection,
    low_precision,
    make_case,
    oracle,
)
from train.ops.select_attend import SelectAttendOutput, select_attend
from train.ops.select_attend.launch import is_wide
from train.ops.select_attend.schedule import QUESTIONS, schedule, tile_bound

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8]
NAMES = ["pooled", "lse", "grad queries", "grad selector", "grad bias"]


def run(case: Case, leaves: list[Tensor], k: int) -> SelectAttendOutput:
    return select_attend(case.tokens, case.clip_index, *leaves, k, case.scale, implementation="triton")


def gradients(pooled: Tensor, lse: Tensor, leaves: list[Tensor], size: float = 1.0) -> list[Tensor]:
    """Of a fixed random weighting of the outputs, times `size`."""
    gen = torch.Generator().manual_seed(1)
    a = torch.randn(pooled.shape, generator=gen).to(pooled)
    b = torch.randn(lse.shape, generator=gen).to(lse)
    loss = (a * pooled).sum() + (b * lse.masked_fill(lse == -torch.inf, 0)).sum()
    return [g / size for g in torch.autograd.grad(loss * size, leaves)]


def yardstick(dtype: torch.dtype) -> torch.dtype:
    """What the kernel multiplies in."""
    if dtype == torch.bfloat16:
        return torch.float32 if INTERPRETED else torch.bfloat16
    return torch.float32 if dtype == torch.float32 else torch.float16


def check(case: Case, k: int, size: float = 1.0) -> SelectAttendOutput:
    """Selection, outputs and every gradient against the loops in float64."""
    exact_leaves, eager_leaves, leaves = case.leaves(torch.float64), case.leaves(), case.leaves()
    out = run(case, leaves, k)
    assert_same_selection(out.kept, case, k)
    exact_case = Case(case.tokens, case.clip_index, *exact_leaves, case.scale)
    exact, _ = oracle(exact_case, k, out.kept)
    eager = low_precision(case, eager_leaves, out.kept, yardstick(case.tokens.dtype))
    exact_all = [*exact, *gradients(*exact, exact_leaves)]
    eager_all = [*eager, *gradients(*eager, eager_leaves)]
    actual_all = [out.pooled, out.lse, *gradients(out.pooled, out.lse, leaves, size)]
    for name, a, e, x in zip(NAMES, actual_all, eager_all, exact_all, strict=True):
        assert_as_exact_as(a, e, x, name)
    return out


@pytest.mark.parametrize("k", [1, 9, 33])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=["float16", "float32"]
)
def test_odd_patches_and_width(dtype: torch.dtype, k: int) -> None:
    check(make_case(3, 7, 2, 33, 96, 3, dtype, device=DEVICE), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_token_dtype(dtype: torch.dtype, scaled: bool) -> None:
    check(make_case(2, 5, 2, 17, 48, 2, dtype, scaled, device=DEVICE), 5)


def test_egovlpv2_shape() -> None:
    check(make_case(2, 3, 1, 196, 768, 4, torch.float16, device=DEVICE), 49)


@pytest.mark.parametrize("k", [13, 48])
def test_seven_by_seven(k: int) -> None:
    check(make_case(2, 3, 2, 49, 64, 4, torch.float16, device=DEVICE), k)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(1, 50))
def test_every_k(k: int) -> None:
    check(make_case(2, 3, 1, 49, 32, 2, torch.float16, seed=k, device=DEVICE), k)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("k", [1, 10, 98, 196])
def test_egovlpv2_shape_every_ratio(dtype: torch.dtype, k: int) -> None:
    check(make_case(3, 5, 2, 196, 768, 12, dtype, scaled=True, device=DEVICE), k)


@pytest.mark.slow
@pytest.mark.parametrize("patches", [16, 65, 129, 256])
def test_block_sizes(patches: int) -> None:
    check(make_case(2, 3, 1, patches, 80, 5, torch.float16, device=DEVICE), math.ceil(patches / 4))


@pytest.mark.parametrize(
    ("patches", "dtype", "k"),
    [
        (257, torch.float16, 64),
        (300, torch.int8, 1),
        (129, torch.float32, 32),
        pytest.param(1024, torch.float16, 256, marks=pytest.mark.slow),
        pytest.param(1024, torch.float16, 1024, marks=pytest.mark.slow),
        pytest.param(1000, torch.bfloat16, 999, marks=pytest.mark.slow),
        pytest.param(576, torch.float8_e4m3fn, 29, marks=pytest.mark.slow),
        pytest.param(513, torch.int8, 128, marks=pytest.mark.slow),
        pytest.param(1023, torch.float32, 1, marks=pytest.mark.slow),
        pytest.param(1023, torch.float32, 512, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_frames_of_several_blocks(patches: int, dtype: torch.dtype, k: int) -> None:
    check(make_case(2, 5, 1, patches, 48, 5, dtype, scaled=True, device=DEVICE), k)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_largest_frame(dtype: torch.dtype) -> None:
    check(make_case(2, 3, 1, 1024, 1024, 4, dtype, device=DEVICE), 256)


@pytest.mark.parametrize("k", [1, 128, 299])
def test_ties_across_blocks_go_to_the_lowest_patch(k: int) -> None:
    """Every score equal, and equal ones with larger ones behind them in another block."""
    case = make_case(1, 2, 1, 300, 16, 2, torch.float16, device=DEVICE)
    flat = Case(case.tokens, case.clip_index, case.queries, case.selector * 0, case.bias * 0, None)
    out = check(flat, k)
    assert torch.equal(out.kept.cpu(), torch.arange(k).expand(2, 1, k))
    flat.bias[..., 290:295] = 1
    higher = range(290, 290 + min(k, 5))
    lowest = [n for n in range(300) if n not in higher][: k - len(higher)]
    expected = sorted([*lowest, *higher])
    assert run(flat, flat.leaves(), k).kept.unique(dim=0).tolist() == [[expected]]


@pytest.mark.parametrize("k", [5, 290])
def test_blocks_without_a_finite_score(k: int) -> None:
    """The kept patches lie in the first block, in the last, or nowhere."""
    case = make_case(3, 3, 1, 300, 16, 2, torch.float16, device=DEVICE)
    case.clip_index[:] = torch.tensor([0, 1, 2], device=DEVICE)
    case.bias[0, :, 4:] = -torch.inf
    case.bias[1, :, :297] = -torch.inf
    case.bias[2] = -torch.inf
    out = check(case, k)
    empty = case.clip_index == 2
    assert (out.pooled[empty] == 0).all()
    assert (out.lse[empty] == -torch.inf).all()


def test_repeats_over_blocks_are_bit_equal_and_all_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, 20, 1, 260, 32, 5, torch.float16, device=DEVICE)
    plain = [*(out := run(case, leaves := case.leaves(), 70)), *gradients(out.pooled, out.lse, leaves)]
    poison(monkeypatch)
    again = [*(out := run(case, leaves := case.leaves(), 70)), *gradients(out.pooled, out.lse, leaves)]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("patches", [20, 300])
def test_tokens_kept_whole_are_read_in_place(patches: int) -> None:
    """`clip_rows` gives what gathering the clips first gives, bit for bit."""
    whole = make_case(6, 5, 1, patches, 32, 2, torch.int8, scaled=True, device=DEVICE)
    rows = torch.tensor([5, 0, 3, 3], device=DEVICE)
    rest = (whole.clip_index % 4, whole.queries, whole.selector, whole.bias[rows])
    gathered = Case(whole.tokens[rows], *rest, whole.scale[rows])
    leaves, again = gathered.leaves(), gathered.leaves()
    out = run(gathered, leaves, 7)
    placed = select_attend(whole.tokens, rest[0], *again, 7, whole.scale, implementation="triton", clip_rows=rows)
    assert all(torch.equal(a, b) for a, b in zip(out, placed, strict=True))
    for a, b in zip(gradients(*out[:2], leaves), gradients(*placed[:2], again), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["tokens", "scale", "queries", "selector", "bias"])
def test_strided_inputs_read_as_their_copies(name: str) -> None:
    case = make_case(3, 6, 2, 17, 32, 2, torch.int8, scaled=True, device=DEVICE)
    values = dict(vars(case))
    values[name] = values[name].repeat_interleave(2, dim=1 if name == "selector" else 0)[
        (slice(None), slice(None, None, 2)) if name == "selector" else slice(None, None, 2)
    ]
    out, copy = run(Case(**values), Case(**values).leaves(), 5), run(case, case.leaves(), 5)
    assert all(torch.equal(a, b) for a, b in zip(out, copy, strict=True))


def test_more_questions_of_a_clip_than_a_program_takes_and_absent_clips() -> None:
    case = make_case(6, 3 * QUESTIONS + 7, 2, 20, 32, 2, torch.float16, device=DEVICE)
    case.clip_index[:] = torch.tensor([4] * (2 * QUESTIONS + 1) + [0, 2, 2, 5] * 5 + [4, 2], device=DEVICE)
    check(case, 5)
    leaves = case.leaves()
    out = run(case, leaves, 5)
    assert (gradients(out.pooled, out.lse, leaves)[2][[1, 3]] == 0).all()


@pytest.mark.parametrize("k", [1, 6, 20])
def test_equal_scores_go_to_the_lowest_patch(k: int) -> None:
    case = make_case(2, 5, 2, 20, 16, 2, torch.float16, device=DEVICE)
    flat = Case(case.tokens, case.clip_index, case.queries, case.selector * 0, case.bias * 0, None)
    out = check(flat, k)
    assert torch.equal(out.kept.cpu(), torch.arange(k).expand(5, 2, k))


def test_ties_at_the_threshold_and_between_zeros() -> None:
    case = make_case(1, 1, 1, 6, 16, 1, device=DEVICE)
    bias = torch.tensor([[[0.0, 3.0, -0.0, 2.0, 0.0, -1.0]]], device=DEVICE)
    tied = Case(case.tokens, case.clip_index, case.queries, case.selector * 0, bias, None)
    assert run(tied, tied.leaves(), 4).kept.tolist() == [[[0, 1, 2, 3]]]
    assert run(tied, tied.leaves(), 3).kept.tolist() == [[[0, 1, 3]]]


@pytest.mark.parametrize("k", [3, 18])
def test_rows_without_a_finite_score(k: int) -> None:
    case = make_case(3, 8, 2, 20, 16, 2, torch.float16, device=DEVICE)
    case.bias[1] = -torch.inf
    case.bias[2, 0, 2:] = -torch.inf
    case.clip_index[:3] = torch.tensor([0, 1, 2], device=DEVICE)
    leaves = case.leaves()
    out = run(case, leaves, k)
    empty = case.clip_index == 1
    assert (out.pooled[empty] == 0).all()
    assert (out.lse[empty] == -torch.inf).all()
    # Even where the loss is not masked and its gradient at an infinite lse is not a number.
    grads = torch.autograd.grad(out.lse.exp().log().sum() + out.pooled.sum(), leaves)
    assert (grads[0][empty] == 0).all()
    assert (grads[2][1] == 0).all()
    check(case, k)


def test_small_gradients_do_not_underflow() -> None:
    check(make_case(2, 4, 2, 33, 32, 2, torch.float16, device=DEVICE), 9, size=1e-9)


def test_small_scales_do_not_underflow() -> None:
    case = make_case(2, 4, 2, 33, 32, 2, torch.int8, scaled=True, device=DEVICE)
    small = Case(case.tokens, case.clip_index, case.queries * 1e4, case.selector * 1e4, case.bias, case.scale * 1e-4)
    exact, _ = oracle(small, 9)
    out = run(small, small.leaves(), 9)
    torch.testing.assert_close(out.pooled.double(), exact[0], rtol=4e-3, atol=4e-7)


def test_repeats_are_bit_equal() -> None:
    case = make_case(3, 20, 2, 20, 32, 2, torch.float16, device=DEVICE)
    runs = []
    for _ in range(2):
        leaves = case.leaves()
        out = run(case, leaves, 7)
        runs.append([*out, *gradients(out.pooled, out.lse, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_frames_of_a_program_add_up_as_frames_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward over all frames in a program and over one frame each."""
    from train.ops.select_attend import triton as kernels

    case = make_case(2, 6, 5, 17, 32, 2, device=DEVICE)
    grads = []
    for programs in (1, 10**6):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        leaves = case.leaves()
        out = run(case, leaves, 7)
        grads.append(gradients(out.pooled, out.lse, leaves))
    for together, apart in zip(*grads, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_strided_tokens_read_as_their_copy() -> None:
    case = make_case(3, 6, 4, 17, 32, 2, torch.float16, device=DEVICE)
    view = torch.empty(6, 4, 19, 80, dtype=torch.float16, device=DEVICE)[::2, :, 1:18, 16:48]
    view.copy_(case.tokens)
    strided = Case(view, case.clip_index, case.queries, case.selector, case.bias, None)
    out, copy = run(strided, strided.leaves(), 5), run(case, case.leaves(), 5)
    assert all(torch.equal(a, b) for a, b in zip(out, copy, strict=True))


@pytest.mark.parametrize(
    ("patches", "strides"),
    [(17, (2**31, 17 * 32, 32, 1)), (17, (32, 64, 2**27, 1)), (300, (32, 64, 2**23, 1))],
    ids=["clips", "patches", "blocks"],
)
def test_more_than_two_to_the_31_elements(patches: int, strides: tuple[int, ...]) -> None:
    """Tokens spread over more elements than 32 bits count; the pages between them are never touched."""
    case = make_case(2, 5, 2, patches, 32, 2, torch.int8, scaled=True, device=DEVICE)
    shape = case.tokens.shape
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert last > 2**31
    spread = torch.empty(last + 1, dtype=torch.int8, device=DEVICE).as_strided(shape, strides)
    spread.copy_(case.tokens)
    check(Case(spread, case.clip_index, case.queries, case.selector, case.bias, case.scale), 5)


def test_many_rows_are_counted_in_64_bits() -> None:
    """Outputs of more than 2^31 elements need wide offsets as well; nothing of that size is made."""
    tokens = torch.empty(1, 16, 196, 768, dtype=torch.float16, device="meta")
    most = 2**31 // (16 * 12 * 768)
    assert not is_wide(tokens, torch.empty(most, 12, 768, device="meta"))
    assert is_wide(tokens, torch.empty(most + 1, 12, 768, device="meta"))


class HostReads(TorchDispatchMode):
    """Refuses whatever waits for a device or reads its answer, which a CUDA graph cannot hold."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in func.name() for name in self.REFUSED), f"{func} reads the device's memory"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("patches", [20, 300])
def test_nothing_of_the_device_is_read_on_the_host(patches: int) -> None:
    """The kernels' own launch code, below the operators: what a CUDA graph captures."""
    from train.ops.select_attend import triton as kernels

    case = make_case(3, 7, 1, patches, 32, 2, torch.float16, device=DEVICE)
    rows = torch.arange(3, device=DEVICE)
    inputs = (case.queries, case.selector, case.bias)
    with HostReads():
        pooled, lse, kept, *saved = kernels.forward(case.tokens, case.clip_index, *inputs, 5, None, rows)
        kernels.backward(torch.ones_like(pooled), lse, case.tokens, *inputs, None, lse, *saved)
    with pytest.raises(AssertionError, match="reads the device's memory"), HostReads():
        kept.max().item()


def test_no_questions() -> None:
    case = make_case(2, 0, 3, 9, 16, 2, device=DEVICE)
    leaves = case.leaves()
    out = run(case, leaves, 4)
    assert [tuple(t.shape) for t in out] == [(0, 3, 2, 16), (0, 3, 2), (0, 3, 4)]
    assert (gradients(out.pooled, out.lse, leaves)[2] == 0).all()


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the kernels get holds NaN or -1 until they write it."""
    from train.ops.select_attend import triton as kernels

    def poisoned(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(size, math.nan if dtype.is_floating_point else -1, dtype=dtype, device=device)

    monkeypatch.setattr(kernels.torch, "empty", poisoned)


def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    check(make_case(3, 7, 2, 33, 96, 3, torch.float16, device=DEVICE), 9)


@pytest.mark.parametrize("clips", [[], [0], [2] * 40, [0, 3, 3, 1, 0], list(range(4)) * 17])
def test_schedule_covers_every_question_once(clips: list[int]) -> None:
    clip_index = torch.tensor(clips, dtype=torch.int64, device=DEVICE)
    order, tiles, clip_tiles = schedule(clip_index, 4)
    assert len(tiles) == tile_bound(len(clips), 4)
    seen = []
    for i, (clip, first, count, row) in enumerate(tiles.tolist()):
        questions = order[first : first + count].tolist()
        assert all(clips[question] == clip for question in questions)
        assert row == clip
        assert count == 0 or clip_tiles[clip] <= i < clip_tiles[clip + 1]
        seen += questions
    assert sorted(seen) == list(range(len(clips)))


def test_operators_and_full_graphs() -> None:
    from train.ops.select_attend import library

    case = make_case(3, 7, 2, 33, 96, 2, torch.float16, scaled=True, device=DEVICE)
    torch.library.opcheck(library.triton_forward, (case.tokens, case.clip_index, *case.leaves(), 9, case.scale, None))

    def loss(queries: Tensor, selector: Tensor, bias: Tensor) -> Tensor:
        out = run(case, [queries, selector, bias], 9)
        return out.pooled.square().sum() + out.lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves, again = case.leaves(), case.leaves()
    eager = [loss(*leaves), *torch.autograd.grad(loss(*leaves), leaves)]
    graph = [compiled(*again), *torch.autograd.grad(compiled(*again), again)]
    assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))


WRONG = {
    "width": (make_case(2, 3, 1, 9, 24, 1), r"tokens has 24 channels; expected a multiple of 16 up to 1024"),
    "patches": (make_case(1, 1, 1, 1025, 16, 1), r"tokens has 1025 patches; expected at most 1024"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_unsupported_shapes_are_named(wrong: str) -> None:
    case, message = WRONG[wrong]
    case = Case(*(None if t is None else t.to(DEVICE) for t in vars(case).values()))
    with pytest.raises(ValueError, match=message):
        run(case, case.leaves(), 4)


def test_unsupported_strides_and_dtypes_are_named() -> None:
    case = make_case(2, 3, 1, 9, 16, 1, device=DEVICE)
    transposed = case.tokens.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match=r"tokens has strides \(144, 144, 1, 9\); expected 1 last"):
        run(Case(transposed, *list(vars(case).values())[1:]), case.leaves(), 4)
    with pytest.raises(ValueError, match=r"queries is torch.float64; expected at most float32"):
        run(case, case.leaves(torch.float64), 4)
