"""The Triton kernels without a GPU: interpreted, registered, and compiled ahead of time."""

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernel_budget import DTYPES, SHAPES, SHARED_LIMIT, TARGET, Usage, assemble, from_json, shipped
from egopatch.train.ops.select_attend import library, plan, select_attend
from tests.child_pytest import run_pytest
from tests.train.ops.cases import make_case

ROOT = Path(__file__).resolve().parents[3]
INTERPRETED = [
    "tests/train/ops/interpreted_results.py",
    "tests/train/ops/interpreted_launch.py",
    "tests/train/ops/interpreted_philox.py",
]
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def without_triton(imported: str, value: str) -> str:
    """What Python without Triton prints for the expression `value`."""
    result = run(["-c", f"import sys, torch; sys.modules['triton'] = None\n{imported}\nprint({value})"])
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@needs_triton
@pytest.mark.slow
def test_the_kernels_pass_their_tests_in_the_interpreter() -> None:
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # The interpreter of Triton 3.6 makes numbers of arrays in a way that NumPy deprecates.
    plugins = ("-p", "tests.train.ops.interpreter", "-W", "ignore:Conversion of an array:DeprecationWarning")
    result = run_pytest(*INTERPRETED, *plugins, "-m", "slow or not slow", **environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout[-2000:]
    assert "skipped" not in result.stdout.splitlines()[-1]
    assert int(passed.group(1)) >= 170


def budget(*arguments: str) -> list[Usage]:
    result = run(["benchmarks/kernel_budget.py", "--json", *arguments])
    assert result.returncode in (0, 1), result.stderr
    return from_json(result.stdout)


@needs_triton
@pytest.mark.slow
def test_shipped_kernels_fit_the_hardware_limits() -> None:
    usages = budget("--quick")
    instructions = {"sm_80": "mma", "sm_90a": "wgmma", "sm_100a": "tcgen05", "sm_120a": "mma"}
    kernels = ("forward", "logits", "queries")
    assert {(u.kernel, u.arch) for u in usages} == {(kernel, arch) for kernel in kernels for arch in instructions}
    assert [u for u in usages if u.shared_bytes > u.shared_limit] == []
    # With Triton 3.6 on Hopper, a frame of odd size spills 16 bytes if results are bfloat16 (docs/kernels.md).
    assert [u for u in usages if u.spill_bytes > (16 if u.shape[0] % 2 else 0)] == []
    assert all(u.matrix_instruction == instructions[u.arch] for u in usages)


@needs_triton
@pytest.mark.slow
def test_the_main_shape_fits_in_every_dtype() -> None:
    """The other shapes and versions of Triton are compiled by hand, with their results committed."""
    assert [usage for usage in budget("--main") if not usage.fits] == []


def test_no_kernel_of_the_committed_budget_spills() -> None:
    usages = from_json((ROOT / "benchmarks" / "results" / "kernel_budget.json").read_text())
    assert [usage for usage in usages if not usage.fits] == []
    # RTX 30 and 40 (8.6 and 8.9) run what an A100 does, in the shared memory of RTX 50.
    assert max(usage.shared_bytes for usage in usages if usage.arch == "sm_80") <= SHARED_LIMIT["sm_120a"]
    compiled = [(u.triton, u.kernel, u.arch, u.shape, u.dtype, u.pooled) for u in usages]
    cases = shipped(SHAPES, tuple(DTYPES))
    expected = [(v, c.kernel, TARGET[c.arch], c.shape, c.dtype, c.pooled) for v in VERSIONS for c in cases]
    assert Counter(compiled) == Counter(expected)


@needs_triton
@pytest.mark.filterwarnings("ignore:AnnAssign:DeprecationWarning")  # of Triton 3.8 with Python 3.13
@pytest.mark.parametrize("arch", [80, 90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (100, 120))])
def test_dropout_compiles_to_vector_accesses_without_spills(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from triton import compile as compile_ahead
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from egopatch.train.ops.philox.kernels import BLOCKS, CHANGING, dropout_kernel

    types = {"x": "*fp32", "out": "*fp32", "seeds": "*i64", "position": "*i64", "scale": "fp32"}
    constants = {"wanted": None, "BLOCK": 16, "BLOCKS": BLOCKS}
    names = dropout_kernel.arg_names
    assert set(CHANGING) < set(names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "out", "seeds", "entries")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(dropout_kernel, signature, values, aligned)
    ptx = compile_ahead(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx
    assert assemble(ptx, arch)[1] == 0


@pytest.mark.slow
@needs_triton
def test_the_budget_refuses_the_interpreter() -> None:
    result = run(["benchmarks/kernel_budget.py"], TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set; unset it" in result.stderr


def test_triton_is_refused_on_a_cpu() -> None:
    if find_spec("triton") is None:
        message = r"Triton is not installed; expected 3.6 or newer .* with implementation 'triton'; or use 'auto'"
    else:
        message = r"tokens is on cpu; expected a CUDA device with implementation 'triton'; or use 'auto'"
    case = make_case(2, 3, 1, 9, 16, 1)
    with pytest.raises(ValueError, match=message):
        select_attend(case.tokens, case.clip_index, case.queries, case.selector, case.bias, 4, implementation="triton")


def test_an_old_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TRITON", "3.5.1")
    case = make_case(2, 3, 1, 9, 16, 1)
    arguments = (case.tokens, case.clip_index, case.queries, case.selector, case.bias, 4)
    with pytest.raises(ValueError, match=r"Triton 3.5.1 is installed; expected 3.6 or newer"):
        select_attend(*arguments, implementation="triton")


def test_a_gpu_that_cannot_run_the_kernels_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TRITON", "3.9.0")
    monkeypatch.setattr(plan.machine, "triton_fault", lambda device: f"no compiler for {device}")
    tokens: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert plan.choose_implementation(tokens, torch.float32, "auto") == ("reference", "no compiler for cuda:0")


@pytest.mark.slow
def test_the_reference_needs_no_triton() -> None:
    arguments = (
        "torch.ones(1, 1, 4, 16), torch.zeros(2, dtype=torch.long), torch.ones(2, 1, 16), torch.ones(2, 16),"
        " torch.zeros(1, 1, 4), 2"
    )
    imported = "from egopatch.train.ops.select_attend import select_attend"
    assert without_triton(imported, f"select_attend({arguments}).kept.tolist()") == "[[[0, 1]], [[0, 1]]]"


# Its own look at a tensor's gradient warns, which the filters of torch 2.14 hide only if warnings are no errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_reference_operator_passes_opcheck() -> None:
    case = make_case(3, 7, 2, 33, 96, 2, torch.float16, scaled=True)
    torch.library.opcheck(
        library.reference_forward, (case.tokens, case.clip_index, *case.leaves(), 9, case.scale, None)
    )


# Inductor imports parts of torch, and inspects modules, that raise deprecation warnings.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Guards may run slower on Python 3.13.0")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_reference_compiles_to_one_graph(backend: str) -> None:
    case = make_case(3, 7, 2, 33, 96, 2, torch.float16, scaled=True)

    def loss(queries: torch.Tensor, selector: torch.Tensor, bias: torch.Tensor, k: int) -> torch.Tensor:
        out = select_attend(case.tokens, case.clip_index, queries, selector, bias, k, case.scale)
        return out.pooled.square().sum() + out.lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for k in (9, 12):
        leaves, again = case.leaves(), case.leaves()
        eager = [loss(*leaves, k), *torch.autograd.grad(loss(*leaves, k), leaves)]
        graph = [compiled(*again, k), *torch.autograd.grad(compiled(*again, k), again)]
        for a, b in zip(eager, graph, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_select_attend_works_under_autocast() -> None:
    case = make_case(3, 7, 2, 33, 96, 2, torch.float16)
    project = torch.nn.Linear(96, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queries = project(case.queries)
        out = select_attend(case.tokens, case.clip_index, queries, case.selector, case.bias, 9)
    assert queries.dtype == out.pooled.dtype == torch.bfloat16
    out.pooled.float().sum().backward()
    assert project.weight.grad is not None
    assert project.weight.grad.isfinite().all()
