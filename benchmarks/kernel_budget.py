"""Compile the kernels of `select_attend` ahead of time, without a GPU, and print the resources that they use.

    python benchmarks/kernel_budget.py [--json] [--quick]

Every shipped configuration is compiled for sm_80 and sm_90a. Exit code 1 if one spills registers or needs more shared
memory than the GPU has, 2 if this machine cannot compile.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block can have, CUDA programming guide, table of capabilities
TARGET = {80: "sm_80", 90: "sm_90a"}
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# N, D, H: each size of block that the kernels are cut for, and the limits of the supported range.
SHAPES = (
    (49, 768, 4), (128, 768, 4), (196, 768, 4), (512, 768, 4), (1000, 768, 4),
    (196, 768, 12), (196, 1024, 12), (1024, 1024, 12), (33, 80, 1),
)  # fmt: skip
WIDE = ((49, 768, 4), (196, 768, 4), (1000, 768, 4))  # also compiled with 64-bit offsets
QUICK = ((196, 768, 4), (1000, 768, 4))


@dataclass(frozen=True)
class Case:
    """One kernel to compile: `kernel` is forward or backward, shape is N, D, H; `wide` compiles 64-bit offsets."""

    kernel: str
    arch: int
    shape: tuple[int, int, int]
    dtype: str
    wide: bool = False


@dataclass(frozen=True)
class Usage:
    """Resources of a multiprocessor that a compiled kernel uses."""

    kernel: str
    arch: str
    shape: tuple[int, int, int]
    dtype: str
    wide: bool
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instruction: str
    triton: str  # version of the compiler; the machine that compiles changes nothing

    @property
    def fits(self) -> bool:
        return self.spill_bytes == 0 and self.shared_bytes <= self.shared_limit


def shipped(quick: bool) -> list[Case]:
    """Every kernel, architecture, shape and dtype; `quick` keeps one shape of each forward kernel in float16."""
    shapes = [(shape, False) for shape in (QUICK if quick else SHAPES)]
    shapes += [(shape, True) for shape in (() if quick else WIDE)]
    return [
        Case(kernel, arch, shape, dtype, wide)
        for shape, wide in shapes
        for dtype in (("float16",) if quick else DTYPES)
        for arch in TARGET
        for kernel in ("forward", "backward")
    ]


def measure(case: Case) -> Usage:
    """Compile one case and read its registers, spills and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from egopatch.train.ops.select_attend import backward as triton_backward
    from egopatch.train.ops.select_attend import forward as triton_forward
    from egopatch.train.ops.select_attend import kernels
    from egopatch.train.ops.select_attend.plan import plan_launch

    patches, width, heads = case.shape
    dtype = DTYPES[case.dtype]
    backward = case.kernel == "backward"
    stored = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(case.dtype, "i8")
    scaled = dtype.itemsize == 1
    tokens = torch.empty(1, 1, patches, width, dtype=dtype, device="meta")
    if case.wide:
        tokens = tokens.as_strided(tokens.shape, (0, 0, 2**31 // patches + 1, 1))
    queries = torch.empty(1, heads, width, device="meta")
    launch = plan_launch(tokens, queries)
    scale = tokens if scaled else None
    if backward:
        function = triton_backward.backward_kernel
        constants = kernels.backward_constants(tokens, queries, scale, launch)
    else:
        several = launch.forward.several
        function = triton_forward.forward_blocks_kernel if several else triton_forward.forward_kernel
        constants = kernels.forward_constants(tokens, queries, scale, launch)
    options = {"num_warps": constants.pop("num_warps"), "num_stages": constants.pop("num_stages")}
    if scale is None:
        constants["scale"] = None
    types = {"tokens": f"*{stored}", "kept": "*i64", "mask": "*i8", "order": "*i32", "tiles": "*i32"}
    integers = ("k", "frames", "questions", "span", "stride_c", "stride_t", "stride_n")
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[object]]] = {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in integers else types.get(name, "*fp32")
        # At run time Triton sees the alignment of pointers and strides itself; without it registers overflow.
        if signature[name].startswith("*") or name.startswith("stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spilled = assemble(ptx, case.arch)
    return Usage(
        case.kernel,
        TARGET[case.arch],
        case.shape,
        case.dtype,
        case.wide,
        registers,
        spilled,
        compiled.metadata.shared,
        SHARED_LIMIT[case.arch],
        "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "fma",
        triton.__version__,
    )


def assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers a thread and spilled bytes (stores and loads), from the assembler and options that Triton uses."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={TARGET[arch]}"]
        report = subprocess.run([*command, file, "-o", f"{file}.cubin"], capture_output=True, text=True, check=True)
    used = re.search(r"Used (\d+) registers", report.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr)
    if used is None or spills is None:
        raise RuntimeError(f"{command[0]} reported no registers or spills for {TARGET[arch]}: {report.stderr[:200]!r}")
    return int(used.group(1)), int(spills.group(1)) + int(spills.group(2))


def line(usage: Usage) -> str:
    """A row of the printed table."""
    patches, width, heads = usage.shape
    offsets = "64-bit" if usage.wide else "32-bit"
    return (
        f"{usage.kernel:8} {usage.arch:6} N={patches:<4} D={width:<4} H={heads:<2} {usage.dtype:11} {offsets} "
        f"{usage.matrix_instruction:5} {usage.registers:3} registers {usage.spill_bytes:5} B spilled "
        f"{usage.shared_bytes:6} of {usage.shared_limit} B shared {'ok' if usage.fits else 'DOES NOT FIT'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of the select_attend kernels.")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--quick", action="store_true", help="only two shapes, in float16")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of parallel compilations")
    args = parser.parse_args()
    try:
        import triton
    except ImportError:
        print("kernel_budget: Triton is not installed; run: pip install triton (no GPU is needed)", file=sys.stderr)
        return 2
    if triton.knobs.runtime.interpret:
        print(
            "kernel_budget: TRITON_INTERPRET is set; unset it, since the interpreter compiles nothing", file=sys.stderr
        )
        return 2
    usages = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for usage in pool.map(measure, shipped(args.quick)):
            usages.append(usage)
            if not args.json:
                print(line(usage), flush=True)
    if args.json:
        print(json.dumps([{**asdict(usage), "fits": usage.fits} for usage in usages], indent=1))
    return 0 if all(usage.fits for usage in usages) else 1


if __name__ == "__main__":
    # Set explicitly, because Triton 3.10 changes the default; the kernels are compiled with it at run time too.
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    sys.exit(main())
