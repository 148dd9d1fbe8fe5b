"""What the Triton kernels compute, forward and backward, against float64. `test_triton.py` runs them in Triton's
interpreter, in a process of their own since the interpreter is chosen when the kernels are imported; `test_cuda.py`
runs them on a GPU.
"""

import math

import pytest
import torch

from egopatch.train.ops.select_attend.plan import QUESTIONS
from tests.train.ops.cases import Case, assert_same_selection, gradients, make_case, oracle
from tests.train.ops.kernel_checks import DEVICE, check, run


def slow(*shape: object) -> object:
    return pytest.param(*shape, marks=pytest.mark.slow)


F16, BF16, F32, F8, I8 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8
SHAPES = [  # clips, questions, frames, patches, width, heads, dtype, scaled, k
    # Odd numbers of patches and channels.
    (3, 7, 2, 33, 96, 3, F16, False, 9),
    *(slow(3, 7, 2, 33, 96, 3, dtype, False, k) for dtype, k in ((F16, 1), (F16, 33), (F32, 1), (F32, 9), (F32, 33))),
    # A grid of seven by seven.
    (2, 3, 2, 49, 64, 4, F16, False, 48),
    slow(2, 3, 2, 49, 64, 4, F16, False, 13),
    # EgoVLPv2's frames. A frame is selected by itself, so one k has a second frame.
    *(slow(2, 3, 1, 196, 768, 12, dtype, True, k) for dtype, k in ((F16, 10), (BF16, 1), (BF16, 196), (I8, 1))),
    *(slow(2, 3, 2, 196, 768, 12, dtype, True, 98) for dtype in (F16, I8)),
    # Each size of blocks.
    *(slow(2, 3, 1, patches, 80, 5, F16, False, math.ceil(patches / 4)) for patches in (16, 65, 129, 256)),
    # Frames of several blocks.
    (2, 5, 1, 257, 48, 5, F16, True, 64),
    *(slow(2, 5, 1, patches, 48, 5, I8, True, k) for patches, k in ((300, 1), (513, 128))),
    *(slow(2, 5, 1, patches, 48, 5, F32, True, k) for patches, k in ((129, 32), (1023, 512))),
    *(slow(2, 5, 1, 1024, 48, 5, F16, True, k) for k in (256, 1024)),
    slow(2, 5, 1, 1000, 48, 5, BF16, True, 999),
    slow(2, 5, 1, 576, 48, 5, F8, True, 29),
    # The largest frame.
    *(slow(1, 3, 1, 1024, 1024, 2, dtype, False, 256) for dtype in (F16, F32)),
    # Widths of large encoders.
    (2, 3, 1, 20, 1408, 2, F16, False, 5),
    *(slow(2, 3, 1, 20, width, 2, F16, False, 5) for width in (1152, 1536)),
]


@pytest.mark.parametrize(
    ("clips", "questions", "frames", "patches", "width", "heads", "dtype", "scaled", "k"), SHAPES, ids=str
)
def test_every_shape_matches_float64(
    clips: int,
    questions: int,
    frames: int,
    patches: int,
    width: int,
    heads: int,
    dtype: torch.dtype,
    scaled: bool,
    k: int,
) -> None:
    check(make_case(clips, questions, frames, patches, width, heads, dtype, scaled, device=DEVICE), k)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F8, I8], ids=str)
@pytest.mark.parametrize("scaled", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_token_dtype_matches_float64(dtype: torch.dtype, scaled: bool) -> None:
    check(make_case(2, 5, 2, 17, 48, 2, dtype, scaled, device=DEVICE), 5)


@pytest.mark.slow
@pytest.mark.parametrize("patches", [1, 2, 3, 5])
def test_frames_of_few_patches_match_float64(patches: int) -> None:
    """Rows of scores and of the mask are longer than a frame of 1 to 3 patches, rounded up to a power of two."""
    for k in range(1, patches + 1):
        check(make_case(2, 3, 2, patches, 16, 2, torch.float16, device=DEVICE), k)


@pytest.mark.slow
@pytest.mark.parametrize("k", range(1, 50))
def test_every_k_matches_float64(k: int) -> None:
    check(make_case(2, 3, 1, 49, 32, 2, torch.float16, seed=k, device=DEVICE), k)


@pytest.mark.parametrize("k", [128, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 299))])
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


@pytest.mark.slow
@pytest.mark.parametrize("k", [5, 290])
def test_blocks_without_a_finite_score_give_zeros(k: int) -> None:
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


@pytest.mark.slow
def test_clips_with_many_or_no_questions_match_float64() -> None:
    case = make_case(6, 3 * QUESTIONS + 7, 1, 20, 16, 2, torch.float16, device=DEVICE)
    case.clip_index[:] = torch.tensor([4] * (2 * QUESTIONS + 1) + [0, 2, 2, 5] * 5 + [4, 2], device=DEVICE)
    check(case, 5)
    leaves = case.leaves()
    out = run(case, leaves, 5)
    assert (gradients(out.pooled, out.lse, leaves)[2][[1, 3]] == 0).all()


@pytest.mark.parametrize("k", [6, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 20))])
def test_equal_scores_go_to_the_lowest_patch(k: int) -> None:
    case = make_case(2, 5, 2, 20, 16, 2, torch.float16, device=DEVICE)
    flat = Case(case.tokens, case.clip_index, case.queries, case.selector * 0, case.bias * 0, None)
    out = check(flat, k)
    assert torch.equal(out.kept.cpu(), torch.arange(k).expand(5, 2, k))


def test_ties_at_the_threshold_and_between_signed_zeros_keep_the_lowest() -> None:
    case = make_case(1, 1, 1, 6, 16, 1, device=DEVICE)
    bias = torch.tensor([[[0.0, 3.0, -0.0, 2.0, 0.0, -1.0]]], device=DEVICE)
    tied = Case(case.tokens, case.clip_index, case.queries, case.selector * 0, bias, None)
    assert run(tied, tied.leaves(), 4).kept.tolist() == [[[0, 1, 2, 3]]]
    assert run(tied, tied.leaves(), 3).kept.tolist() == [[[0, 1, 3]]]


@pytest.mark.parametrize("k", [3, pytest.param(18, marks=pytest.mark.slow)])
def test_rows_without_a_finite_score_give_zeros_and_no_gradient(k: int) -> None:
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


@pytest.mark.parametrize("size", [1e-8, pytest.param(1e-4, marks=pytest.mark.slow), 1e5])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_selectors_of_any_size_select_as_in_float32(dtype: torch.dtype, size: float) -> None:
    case = make_case(2, 4, 1, 33, 32, 2, dtype, device=DEVICE)
    scaled = Case(case.tokens, case.clip_index, case.queries, case.selector * size, case.bias * 0, None)
    leaves = scaled.leaves()
    out = run(scaled, leaves, 9)
    assert_same_selection(out.kept, scaled, 9)
    assert all(tensor.isfinite().all() for tensor in (out.pooled, *gradients(out.pooled, out.lse, leaves)))
    if size < 1:
        check(scaled, 9)


def test_small_gradients_do_not_underflow() -> None:
    check(make_case(2, 4, 2, 33, 32, 2, torch.float16, device=DEVICE), 9, size=1e-9)


@pytest.mark.parametrize("size", [1e-39, 1e-44])
def test_gradients_whose_inverse_is_infinite_stay_finite(size: float) -> None:
    case = make_case(2, 4, 2, 33, 32, 2, torch.float16, device=DEVICE)
    leaves = case.leaves()
    out = run(case, leaves, 9)
    for gradient in torch.autograd.grad(out.pooled, leaves, torch.randn_like(out.pooled) * size):
        assert gradient.abs().max() < 1e-30


def test_small_scales_do_not_underflow() -> None:
    case = make_case(2, 4, 2, 33, 32, 2, torch.int8, scaled=True, device=DEVICE)
    small = Case(case.tokens, case.clip_index, case.queries * 1e4, case.selector * 1e4, case.bias, case.scale * 1e-4)
    exact, _ = oracle(small, 9)
    out = run(small, small.leaves(), 9)
    torch.testing.assert_close(out.pooled.double(), exact[0], rtol=4e-3, atol=4e-7)


def test_zero_questions_give_empty_outputs() -> None:
    case = make_case(2, 0, 3, 9, 16, 2, device=DEVICE)
    leaves = case.leaves()
    out = run(case, leaves, 4)
    assert [tuple(t.shape) for t in out] == [(0, 3, 2, 16), (0, 3, 2), (0, 3, 4)]
    assert (gradients(out.pooled, out.lse, leaves)[2] == 0).all()
