"""How the Triton kernels are launched: what they read and write, repeats, registration, refusals. `test_triton.py`
runs them in Triton's interpreter, in a separate process because the interpreter is chosen when the kernels are
imported; `test_cuda.py` runs them on a GPU.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from egopatch.train.ops.select_attend import attend_stacked, select_attend
from egopatch.train.ops.select_attend.plan import tile_bound
from tests.train.ops.cases import Case, gradients, make_case
from tests.train.ops.kernel_checks import DEVICE, INTERPRETED, check, poison, run


@pytest.mark.slow
def test_repeats_over_blocks_are_bit_equal_and_fully_written(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, 4, 1, 260, 16, 5, torch.float16, device=DEVICE)
    plain = [*(out := run(case, leaves := case.leaves(), 70)), *gradients(out.pooled, out.lse, leaves)]
    poison(monkeypatch)
    again = [*(out := run(case, leaves := case.leaves(), 70)), *gradients(out.pooled, out.lse, leaves)]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("patches", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_tokens_selected_by_clip_rows_are_read_in_place(patches: int) -> None:
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


@pytest.mark.parametrize(
    "name", ["tokens", "selector", *(pytest.param(n, marks=pytest.mark.slow) for n in ("scale", "queries", "bias"))]
)
def test_strided_inputs_give_the_results_of_contiguous_ones(name: str) -> None:
    case = make_case(2, 3, 1, 17, 16, 1, torch.int8, scaled=True, device=DEVICE)
    values = dict(vars(case))
    values[name] = values[name].repeat_interleave(2, dim=1 if name == "selector" else 0)[
        (slice(None), slice(None, None, 2)) if name == "selector" else slice(None, None, 2)
    ]
    out, copy = run(Case(**values), Case(**values).leaves(), 5), run(case, case.leaves(), 5)
    assert all(torch.equal(a, b) for a, b in zip(out, copy, strict=True))


@pytest.mark.slow
def test_repeats_are_bit_equal() -> None:
    case = make_case(2, 18, 1, 20, 16, 2, torch.float16, device=DEVICE)
    runs = []
    for _ in range(2):
        leaves = case.leaves()
        out = run(case, leaves, 7)
        runs.append([*out, *gradients(out.pooled, out.lse, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_scratch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward keeps only as many tiles' logits as fit in its scratch memory."""
    from egopatch.train.ops.select_attend import kernels

    case = make_case(2, 20, 2, 17, 16, 1, torch.float16, device=DEVICE)
    grads = []
    for scratch in (1, 2**26):
        monkeypatch.setattr(kernels, "SCRATCH_BYTES", scratch)
        leaves = case.leaves()
        out = run(case, leaves, 7)
        grads.append(gradients(out.pooled, out.lse, leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
def test_strided_tokens_give_the_results_of_contiguous_ones() -> None:
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
def test_tokens_may_span_more_than_two_to_the_31_elements(patches: int, strides: tuple[int, ...]) -> None:
    """Tokens spread over more elements than 32 bits count; the pages between them are never touched."""
    case = make_case(2, 5, 2, patches, 32, 2, torch.int8, scaled=True, device=DEVICE)
    shape = case.tokens.shape
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert last > 2**31
    spread = torch.empty(last + 1, dtype=torch.int8, device=DEVICE).as_strided(shape, strides)
    spread.copy_(case.tokens)
    check(Case(spread, case.clip_index, case.queries, case.selector, case.bias, case.scale), 5)


class HostReads(TorchDispatchMode):
    """Fails on operators that wait for the device or read its results, which a CUDA graph cannot capture."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in func.name() for name in self.REFUSED), f"{func} reads the device's memory"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("patches", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_launch_code_does_not_read_device_memory_on_the_host(patches: int) -> None:
    """The kernels' own launch code, below the operators: what a CUDA graph captures."""
    from egopatch.train.ops.select_attend import kernels

    case = make_case(3, 7, 1, patches, 32, 2, torch.float16, device=DEVICE)
    rows = torch.arange(3, device=DEVICE)
    inputs, ks = (case.queries, case.selector, case.bias), torch.full((3,), 5, dtype=torch.int32, device=DEVICE)
    with HostReads():
        pooled, lse, kept, *saved = kernels.forward(
            case.tokens, case.clip_index, *inputs, ks, 5, None, rows, stacked=1, dtype=torch.float32
        )
        kernels.backward(torch.ones_like(pooled), lse, case.tokens, *inputs, None, lse, *saved)
    with pytest.raises(AssertionError, match="reads the device's memory"), HostReads():
        kept.max().item()


def test_every_output_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    check(make_case(3, 7, 2, 33, 96, 3, torch.float16, device=DEVICE), 9)


@pytest.mark.parametrize("heads", [3, 5])
def test_padding_heads_read_only_initialised_memory(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of four heads ends in the next tile, which has no questions here; NumPy warns of infinity times zero."""
    poison(monkeypatch, math.inf)
    case = make_case(3, 2, 1, 16, 16, heads, torch.float16, device=DEVICE)
    case.clip_index[:] = 0
    check(case, 4)


@pytest.mark.parametrize(
    ("patches", "ks", "in_place"),
    [(16, (16, 3), True), pytest.param(300, (40, 299), False, marks=pytest.mark.slow)],
    ids=["one block", "blocks"],
)
def test_stacked_heads_in_one_launch_equal_separate_launches(patches: int, ks: tuple[int, ...], in_place: bool) -> None:
    """Bit for bit, each with its own k, also if the tokens are rows of more clips."""
    stored = make_case(3, 4, 2, patches, 16, 2, torch.int8, scaled=True, device=DEVICE)
    rows = torch.tensor([2, 0], device=DEVICE) if in_place else None
    clips = 2 if in_place else 3
    heads = [make_case(clips, 4, 2, patches, 16, 2, seed=seed, device=DEVICE) for seed in range(len(ks))]
    inputs = [torch.stack(tensors) for tensors in zip(*(head.leaves() for head in heads), strict=True)]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    numbers = torch.tensor(ks, dtype=torch.int32, device=DEVICE)
    shared = (stored.tokens, stored.clip_index % clips)
    with HostReads():
        pooled, lse, mask = attend_stacked(*shared, *leaves, numbers, stored.scale, rows)
    grads = torch.autograd.grad(pooled.sin().sum() + lse.cos().sum(), leaves)
    for m, (head, k) in enumerate(zip(heads, ks, strict=True)):
        alone = head.leaves()
        out = select_attend(*shared, *alone, k, stored.scale, implementation="triton", clip_rows=rows)
        assert torch.equal(mask[m].nonzero()[:, -1].view(out.kept.shape), out.kept)
        expected = torch.autograd.grad(out.pooled.sin().sum() + out.lse.cos().sum(), alone)
        for a, b in zip((pooled, lse, *grads), (out.pooled, out.lse, *expected), strict=True):
            assert torch.equal(a[m], b)


@pytest.mark.parametrize("patches", [16, pytest.param(300, marks=pytest.mark.slow)])
def test_autocast_rounds_pooled_outputs_and_their_gradients(patches: int) -> None:
    """Rounded once, as float32 would be before the next product, so that no conversion is needed."""
    low = torch.float16 if INTERPRETED else torch.bfloat16  # to which the interpreter does not round, but truncates
    case = make_case(2, 3, 2, patches, 16, 2, torch.float16, device=DEVICE)
    ks = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    found = []
    for enabled in (True, False):
        leaves = [leaf[None] for leaf in case.leaves()]
        with torch.autocast(DEVICE, low, enabled=enabled):
            pooled, lse, _ = attend_stacked(case.tokens, case.clip_index, *leaves, ks)
        assert pooled.dtype == (low if enabled else torch.float32)
        assert lse.dtype == torch.float32
        incoming = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0)).to(low).to(pooled)
        found.append([pooled.to(low), lse, *torch.autograd.grad(pooled, leaves, incoming)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("clips", [[], [0], [2] * 40, [0, 3, 3, 1, 0], list(range(4)) * 17, [3, 1, 0] * 400])
def test_schedule_covers_every_question_once(clips: list[int]) -> None:
    clip_index = torch.tensor(clips, dtype=torch.int64, device=DEVICE)
    from egopatch.train.ops.select_attend.schedule import schedule

    order, tiles, clip_tiles = schedule(clip_index, 4)
    assert len(tiles) == tile_bound(len(clips), 4)
    seen = []
    for i, (clip, first, count, row) in enumerate(tiles.tolist()):
        questions = order[first : first + count].tolist()
        assert all(clips[question] == clip for question in questions)
        assert row == clip
        assert (count > 0) == (clip_tiles[clip, 0] <= i < clip_tiles[clip, 1])
        seen += questions
    assert sorted(seen) == list(range(len(clips)))
    assert torch.equal(order, clip_index.sort(stable=True).indices.int())


@pytest.mark.skipif(DEVICE == "cuda", reason="a failed assertion ends the GPU's context")
@pytest.mark.parametrize(("clips", "rows"), [([0, 4], None), ([-1, 0], None), ([0, 3], [0, 5, 1, 1])])
def test_out_of_range_clip_and_row_indices_are_refused(clips: list[int], rows: list[int] | None) -> None:
    from egopatch.train.ops.select_attend.schedule import schedule

    clip_rows = None if rows is None else torch.tensor(rows)
    with pytest.raises(RuntimeError, match="clip_index is not within 0 to 3, or clip_rows is not within 0 to 4"):
        schedule(torch.tensor(clips), 4, clip_rows, 5)


@pytest.mark.slow
def test_operators_pass_opcheck_and_compile_to_full_graphs() -> None:
    from egopatch.train.ops.select_attend import library

    case = make_case(3, 7, 2, 33, 96, 2, torch.float16, scaled=True, device=DEVICE)
    ks = torch.full((3,), 9, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        library.triton_forward,
        (case.tokens, case.clip_index, *case.leaves(), ks, 9, case.scale, None, 1, torch.bfloat16),
    )

    def loss(queries: Tensor, selector: Tensor, bias: Tensor) -> Tensor:
        out = run(case, [queries, selector, bias], 9)
        return out.pooled.square().sum() + out.lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves, again = case.leaves(), case.leaves()
    eager = [loss(*leaves), *torch.autograd.grad(loss(*leaves), leaves)]
    graph = [compiled(*again), *torch.autograd.grad(compiled(*again), again)]
    assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))


WRONG = {
    "width": (make_case(2, 3, 1, 9, 24, 1), r"tokens has 24 channels; expected a multiple of 16 up to 1536"),
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
    odd = torch.empty(2, 1, 9, 20, device=DEVICE)[..., 2:18].copy_(case.tokens)
    with pytest.raises(ValueError, match=r"offset 2 and strides \(180, 180, 20, 1\); expected multiples of 16 bytes"):
        run(Case(odd, *list(vars(case).values())[1:]), case.leaves(), 4)
    with pytest.raises(ValueError, match=r"queries is torch.float64; expected at most float32"):
        run(case, case.leaves(torch.float64), 4)
