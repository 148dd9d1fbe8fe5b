"""Compile the kernels of `select_attend` ahead of time, without a GPU, and print the resources that they use.

    python benchmarks/kernel_budget.py [--json] [--quick | --main] [--triton FOLDER]

Every shipped configuration is compiled for sm_80, sm_90a, sm_100a and sm_120a. Exit code 1 if one spills registers or
needs more shared memory than the GPU has, 2 if this machine cannot compile. `--triton` compiles with another version
than the environment's, from a folder of its own (pip install --no-deps --target FOLDER triton==3.6.0).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


# Bytes of shared memory that a block can have: CUDA programming guide, table of capabilities.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024, "sm_120a": 99 * 1024}
TARGET = {80: "sm_80", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
KERNELS = ("forward", "logits", "queries")
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# N, D, H: shapes for each block size of the kernels, psa's merged patches first, the limits of the supported
# range, and an odd number of patches.
SHAPES = (
    (49, 832, 4), (128, 768, 4), (196, 768, 4), (512, 768, 4), (1000, 768, 4),
    (196, 768, 12), (196, 1024, 12), (256, 1152, 4), (196, 1536, 4), (1024, 1536, 12), (33, 80, 1), (729, 1152, 4),
)  # fmt: skip
MAIN = ((196, 768, 4),)
QUICK = (*MAIN, (197, 768, 4))  # odd rows are read in vectors too


@dataclass(frozen=True)
class Case:
    """One kernel to compile: `kernel` is one of `KERNELS`, shape is N, D, H, `pooled` the dtype of pooled tokens."""

    kernel: str
    arch: int
    shape: tuple[int, int, int]
    dtype: str
    pooled: str


@dataclass(frozen=True)
class Usage:
    """Resources of a multiprocessor that a compiled kernel uses."""

    kernel: str
    arch: str
    shape: tuple[int, int, int]
    dtype: str
    pooled: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix_instruction: str
    triton: str  # version of the compiler; the machine that compiles does not matter

    @property
    def shared_limit(self) -> int:
        return SHARED_LIMIT[self.arch]

    @property
    def fits(self) -> bool:
        return self.spill_bytes == 0 and self.shared_bytes <= self.shared_limit

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor runs at a time, by registers (65,536, in units of 8 a thread) and memory."""
        by_registers = 65536 // (32 * self.warps * -(-self.registers // 8) * 8)
        return min(by_registers, (self.shared_limit + 1024) // (self.shared_bytes + 1024))


def shipped(shapes: Sequence[tuple[int, int, int]], dtypes: Sequence[str]) -> list[Case]:
    """Every kernel, architecture, shape and dtype, for heads in float32 and under autocast."""
    return [
        Case(kernel, arch, shape, dtype, pooled)
        for shape in shapes
        for dtype in dtypes
        for arch in TARGET
        for kernel in KERNELS
        for pooled in (("float32",) if kernel == "queries" else ("float32", "bfloat16"))  # `queries` has no part in it
    ]


def measure(case: Case) -> Usage:
    """Compile one case and read its registers, spills and shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from egopatch.train.ops.select_attend import backward, forward, kernels
    from egopatch.train.ops.select_attend.plan import QUESTIONS, plan_launch

    patches, width, heads = case.shape
    dtype = DTYPES[case.dtype]
    tokens = torch.empty(1, 1, patches, width, dtype=dtype, device="meta")
    queries = torch.empty(1, heads, width, device="meta")
    scale = tokens if dtype.itemsize == 1 else None
    launch = plan_launch(patches, width, heads, dtype.itemsize, case.arch // 10)
    arithmetic = "fp16" if dtype.itemsize == 1 else {"float16": "fp16", "bfloat16": "bf16"}.get(case.dtype, "fp32")
    stored = "i8" if dtype.itemsize == 1 else arithmetic
    if case.kernel == "queries":
        function, product = backward.queries_kernel, launch.product
        constants = kernels.product_constants(tokens, queries, launch)
        block, box = (product.patches, product.channels), (product.rows, product.patches)
        descriptors = {"weights": box}
    else:
        blocks = launch.forward if case.kernel == "forward" else launch.backward
        if case.kernel == "logits":
            function = backward.logits_kernel
            constants = kernels.logits_constants(tokens, queries, scale, blocks)
        else:
            several = patches > blocks.block
            function = forward.forward_blocks_kernel if several else forward.forward_kernel
            constants = kernels.forward_constants(tokens, queries, scale, blocks)
        block = (blocks.block, blocks.channels)
        descriptors = {
            "columns": (blocks.heads * QUESTIONS, blocks.channels), "selectors": (QUESTIONS, blocks.channels)
        }  # fmt: skip
    warps = constants.pop("num_warps")
    limit = constants.pop("maxnreg", 0)
    if "HAS_SCALE" in constants and scale is None:
        constants["scale"] = None
    types = {name: f"tensordesc<{arithmetic}[{rows},{columns}]>" for name, (rows, columns) in descriptors.items()}
    types |= {"cuts": "*i32", "mask": "*i8", "order": "*i32", "tiles": "*i32", "ks": "*i32"}
    types["tokens"] = f"tensordesc<{stored}[1,1,{block[0]},{block[1]}]>"
    if case.kernel == "forward":
        types["tokens_again"] = f"tensordesc<{stored}[1,1,{block[0]},{blocks.pool_channels}]>"
    types |= {"weights": f"*{arithmetic}"} if case.kernel == "logits" else {}
    low = {"float32": "*fp32", "bfloat16": "*bf16"}[case.pooled]
    # The blocks of a frame add up in float32.
    types |= {"grad_pooled": low, "pooled": "*fp32" if patches > launch.forward.block else low}
    integers = ("frames", "questions", "each", "first_tile")
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[object]]] = {}
    for place, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in integers else types.get(name, "*fp32")
        if signature[name].startswith("*"):  # at run time Triton sees the alignment of pointers itself
            aligned[(place,)] = [["tt.divisibility", 16]]
    options = {"num_warps": warps} | ({"maxnreg": limit} if limit else {})
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spilled = assemble(ptx, case.arch)
    instructions = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    return Usage(
        kernel=case.kernel,
        arch=TARGET[case.arch],
        shape=case.shape,
        dtype=case.dtype,
        pooled=case.pooled,
        warps=warps,
        registers=registers,
        spill_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        matrix_instruction=next((name for name, text in instructions.items() if text in ptx), "fma"),
        triton=triton.__version__,
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
    return (
        f"{usage.kernel:8} {usage.arch:7} N={patches:<4} D={width:<4} H={heads:<2} {usage.dtype:11} {usage.pooled:8} "
        f"{usage.matrix_instruction:7} {usage.warps:2} warps {usage.registers:3} registers "
        f"{usage.spill_bytes:5} B spilled "
        f"{usage.shared_bytes:6} of {usage.shared_limit} B shared, {usage.programs} at a time "
        f"{'ok' if usage.fits else 'DOES NOT FIT'}"
    )


def to_json(usages: Sequence[Usage]) -> str:
    """A table: names are written once, since there are thousands of rows."""
    columns = json.dumps([field.name for field in fields(Usage)])
    rows = ",\n".join(json.dumps(list(asdict(usage).values())) for usage in usages)
    return f'{{"columns": {columns}, "rows": [\n{rows}\n]}}'


def from_json(text: str) -> list[Usage]:
    """What `to_json` wrote."""
    table = json.loads(text)
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    return [Usage(**row | {"shape": tuple(row["shape"])}) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of the select_attend kernels.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="only the main shape and one of odd N, in float16")
    parser.add_argument("--main", action="store_true", help="only the main shape, in every dtype")
    parser.add_argument("--triton", type=Path, metavar="FOLDER", help="folder of another version of Triton")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of parallel compilations")
    args = parser.parse_args()
    if args.triton:
        # The processes that compile inherit it, and it comes before the environment's own packages.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(args.triton), os.environ.get("PYTHONPATH", "")])
        sys.path.insert(0, str(args.triton))
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
    shapes = QUICK if args.quick else MAIN if args.main else SHAPES
    cases = shipped(shapes, ("float16",) if args.quick else tuple(DTYPES))
    usages = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for usage in pool.map(measure, cases):
            usages.append(usage)
            if not args.json:
                print(line(usage), flush=True)
    if args.json:
        print(to_json(usages))
    return 0 if all(usage.fits for usage in usages) else 1


if __name__ == "__main__":
    # Set explicitly, because Triton 3.10 changes the default; the kernels are compiled with it at run time too.
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    sys.exit(main())
