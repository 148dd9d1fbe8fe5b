"""The Triton kernels on a GPU. With FAIL_WITHOUT_CUDA=1 these fail, instead of skipping, where there is none."""

from importlib.util import find_spec

import pytest
import torch

from egopatch.train.ops.select_attend import choose_implementation, select_attend
from egopatch.train.ops.select_attend.plan import QUESTIONS, tile_bound
from tests.child_pytest import run_pytest
from tests.train.ops.cases import make_case
from tests.train.ops.test_triton import INTERPRETED

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]


def test_the_interpreted_tests_pass_compiled() -> None:
    # Kernels are compiled for each shape, which takes a core a second or two, and the GPU next to no time.
    at_once = ("-n", "8") if find_spec("xdist") else ()
    result = run_pytest(*INTERPRETED, "-m", "slow or not slow", *at_once)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_auto_takes_triton(cuda: torch.device) -> None:
    tokens = torch.zeros(1, 1, 4, 16, device=cuda)
    assert choose_implementation(tokens, torch.float32, "auto") == ("triton", f"tokens are on {tokens.device}")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_select_attend_does_not_synchronise_with_the_gpu(cuda: torch.device) -> None:
    case = make_case(8, 60, 4, 196, 256, 4, torch.float16, device="cuda")
    leaves = case.leaves()
    select_attend(case.tokens, case.clip_index, *leaves, 49).pooled.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_attend(case.tokens, case.clip_index, *leaves, 49).pooled.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_gives_the_eager_results(cuda: torch.device) -> None:
    case = make_case(8, 60, 4, 196, 256, 4, torch.float16, device="cuda")
    arguments = (case.tokens, case.clip_index, case.queries, case.selector, case.bias, 49)
    eager = select_attend(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = select_attend(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


# Inductor imports parts of torch, and inspects modules, that raise deprecation warnings.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_gives_the_eager_gradients(cuda: torch.device) -> None:
    case = make_case(8, 60, 4, 196, 256, 4, torch.float16, device="cuda")

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        out = select_attend(case.tokens, case.clip_index, *leaves, 49)
        return out.pooled.square().sum() + out.lse.sum()

    leaves, again = case.leaves(), case.leaves()
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(loss(*leaves), leaves), torch.autograd.grad(compiled(*again), again), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_extra_memory_is_small(cuda: torch.device) -> None:
    """Beyond inputs, outputs and gradients: the columns, the gradients of the logits, partial gradients of the bias,
    and 1% of the tokens' bytes.
    """
    from egopatch.train.ops.select_attend.kernels import SCRATCH_BYTES, launch_of  # imports Triton

    questions, clips, frames, patches, heads = 272, 16, 16, 196, 4
    case = make_case(clips, questions, frames, patches, 768, heads, torch.float16, device="cuda")
    leaves = case.leaves()
    tokens = case.tokens.numel() * case.tokens.element_size()
    out = select_attend(case.tokens, case.clip_index, *leaves, 49)
    grad = torch.ones_like(out.pooled)
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    padded = -(-patches // 8) * 8
    slots = tile_bound(questions, clips) * heads * QUESTIONS
    logits = min(slots * frames * padded * 2, SCRATCH_BYTES)
    columns = slots * 768 * 2
    groups = -(-heads // launch_of(case.tokens, case.queries).backward.heads)
    bias = tile_bound(questions, clips) * groups * frames * patches * 4
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out.pooled, leaves, grad)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - gradients - logits - columns - bias <= 0.01 * tokens


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are() -> None:
    here, there = (make_case(8, 60, 4, 196, 256, 4, torch.float16, device=f"cuda:{number}") for number in (0, 1))
    for case in (here, there):
        leaves = case.leaves()
        select_attend(case.tokens, case.clip_index, *leaves, 49).pooled.sum().backward()
    assert torch.cuda.current_device() == 0
    leaves = there.leaves()
    pooled = select_attend(there.tokens, there.clip_index, *leaves, 49).pooled
    expected = select_attend(there.tokens, there.clip_index, *leaves, 49, implementation="reference").pooled
    torch.testing.assert_close(pooled, expected, rtol=1e-3, atol=1e-3)
