"""Time the frozen video encoder, compared with the published attention code and with the machine's matrix rate.

    python benchmarks/encoder.py [--frames 16] [--depth 6] [--batch 1] [--width 768] [--rounds 5] [--quick] [--out FILE]

Variants take turns in one process, so that a busy machine slows all of them; the best round of each counts. Peak memory
is measured in a separate process for each. Weights and frames are random, which does not change the work. On a CPU one
variant encodes a clip per core, as stage one does; on a CUDA device clips/s and the share of the matrix rate (the
model's FLOPs over time, divided by the rate of the fastest single product) are measured at batch 1, 8 and 32. Claims
about bfloat16's speed apply to CPUs with bfloat16 instructions and are left out on others. The largest possible gain of
bfloat16 depends on the CPU too and is reported from the same run.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import (  # noqa: E402
    add_result_arguments,
    bfloat16_instructions,
    resident,
    stamp,
    write_result,
)
from egopatch.extract.datasets import Clip  # noqa: E402
from egopatch.extract.encoders import load_video_encoder  # noqa: E402
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint  # noqa: E402
from egopatch.extract.encoders.checkpoints.standin import published_shapes, random_weight  # noqa: E402
from egopatch.extract.feed.clips import PreparedClip  # noqa: E402
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM  # noqa: E402
from egopatch.extract.worker.on_cores import CoreEncoder  # noqa: E402
from tests.extract.encoders import reference  # noqa: E402

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VARIANTS = ("plain float32", "ours float32", "ours bfloat16")
SIDE_BY_SIDE = "clip a core bfloat16"
GRID, PATCH = 14, 16
CUDA_BATCHES = (1, 8, 32)
SQUARES, QUICK_SQUARES = (2048, 4096), (256,)


@dataclass(frozen=True)
class Work:
    """The work of one call: `batch` clips of `frames` frames through `depth` blocks, `width` channels."""

    frames: int
    depth: int
    batch: int
    width: int = 768

    def flops(self) -> float:
        """Floating-point operations of the matrix products, two to a multiply-add."""
        patches = GRID * GRID
        tokens = 1 + self.frames * patches
        projections = 2 * 16 * self.width**2 * tokens  # qkv and proj twice, and an MLP of four widths
        space = 4 * self.width * self.frames * patches * (1 + patches)
        moments = 4 * self.width * patches * self.frames * (1 + self.frames)
        cls = 2 * 4 * self.width * tokens
        embed = 2 * 3 * PATCH**2 * self.width * self.frames * patches
        return self.batch * (self.depth * (projections + space + moments + cls) + embed)


def checkpoint(work: Work) -> Checkpoint:
    """The lower blocks of EgoVLPv2 with random weights."""
    shapes = published_shapes(
        "egovlpv2",
        width=work.width,
        depth=work.depth,
        text_layers=1,
        fusion=work.depth,
        frames=work.frames,
        patches=GRID * GRID,
        patch=PATCH,
        vocabulary=8,
        positions=8,
        joint=8,
        answers=None,
    )
    return Checkpoint(Path("random"), "bare", {name: random_weight(name, shape, 0) for name, shape in shapes.items()})


def make(variant: str, work: Work, device: str) -> Callable[[], object]:
    """A function that encodes once with `variant`."""
    weights = checkpoint(work)
    frames = torch.randn(work.batch, work.frames, 3, GRID * PATCH, GRID * PATCH, device=device)
    if variant.startswith("plain"):
        tensors = {name: tensor.to(device) for name, tensor in weights.tensors.items()}
        return lambda: reference.encode(tensors, frames, work.depth)
    dtype = TYPES[variant.split()[-1]]
    encoder = load_video_encoder("egovlpv2", weights, work.frames, work.depth, dtype=dtype).to(device)
    if variant == SIDE_BY_SIDE:
        times = np.zeros(work.frames, np.float32)
        clips = [
            PreparedClip(Clip(str(number), Path("none")), frames[0].numpy(), times, "made up", 1, 0.0)
            for number in range(at_once(variant, work))
        ]
        batches = CoreEncoder(encoder, len(clips), "bfloat16", EGOVLP_TRANSFORM)

        def run() -> object:
            for clip in clips:
                batches.add(clip)
            return batches.start()()

        return run
    frames = frames.to(dtype)
    return lambda: encoder(frames)


def at_once(variant: str, work: Work) -> int:
    """Clips that one call of a variant encodes."""
    return torch.get_num_threads() if variant == SIDE_BY_SIDE else work.batch


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def products(
    work: Work, dtype: torch.dtype, device: str, squares: tuple[int, ...]
) -> dict[str, tuple[Callable[[], Tensor], float]]:
    """Matrix products whose best rate is the machine's: large squares, and the network's own two largest shapes."""
    rows = work.batch * (1 + work.frames * GRID * GRID)
    wide = 4 * work.width
    sides = {f"{side} squared": (side, side, side) for side in squares}
    sides |= {"fc1": (rows, work.width, wide), "fc2": (rows, wide, work.width)}
    made = {}
    for name, (m, k, n) in sides.items():
        x, weight = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
        made[name] = (lambda x=x, weight=weight: F.linear(x, weight), 2.0 * m * k * n)
    return made


def peak_memory(variant: str, work: Work) -> int:
    """Bytes that a process grows by while it encodes once, weights and frames excluded."""
    options = [f"--{name}={getattr(work, name)}" for name in ("frames", "depth", "batch", "width")]
    command = [sys.executable, str(Path(__file__).resolve()), *options, "--memory-of", variant]
    # With a fixed threshold malloc frees every large block at once, so that the peak counts only memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def _memory_of(variant: str, work: Work) -> int:
    with torch.inference_mode():
        run = make(variant, work, "cpu")
        run()  # loads code, packed weights and other lasting memory before the measurement
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmHWM")
        run()
        return resident("VmHWM") - before


def measure(
    work: Work, rounds: int, device: str, variants: tuple[str, ...], squares: tuple[int, ...]
) -> dict[str, Any]:
    """Best seconds of each variant and the best matrix rates, from interleaved rounds."""
    runs = {variant: make(variant, work, device) for variant in variants}
    peaks = {name: products(work, dtype, device, squares) for name, dtype in TYPES.items()}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    rates: dict[str, dict[str, float]] = {name: {} for name in TYPES}
    for turn in range(rounds + 1):
        for name, made in peaks.items():
            for product, (run, flops) in made.items():
                rate = flops / timed(run, device)
                rates[name][product] = max(rates[name].get(product, 0.0), rate)
        for variant, run in runs.items():
            took = timed(run, device)
            if turn:  # the first turn warms up
                seconds[variant].append(took)
        print(f"round {turn}/{rounds}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {}
    for variant in variants:
        best, clips = min(seconds[variant]), at_once(variant, work)
        flops = work.flops() / work.batch * clips
        rate = max(rates[variant.split()[-1]].values())
        result[variant] = {
            "seconds": best,
            "seconds_all": seconds[variant],
            "clips_per_s": clips / best,
            "gflops": flops / best / 1e9,
            "share_of_matrix_rate": flops / best / rate,
        }
    result["matrix_gflops"] = {name: {k: v / 1e9 for k, v in found.items()} for name, found in rates.items()}
    return result


def report(result: dict[str, Any]) -> str:
    """The result as text: a table for the CPU, one for each batch on CUDA, and the claims."""
    lines = [] if VARIANTS[0] not in result else _table(f"CPU, batch {result['work']['batch']}", result)
    for batch, measured in result.get("cuda", {}).items():
        lines += _table(f"{result['machine']['gpu']}, batch {batch}", measured)
    lines += [f"{name}: {value:.2f}" for name, value in result["claims"].items()]
    return "\n".join(lines)


def _table(title: str, measured: dict[str, Any]) -> list[str]:
    lines = [title, f"{'':20}{'seconds':>9}{'clips/s':>9}{'GFLOP/s':>10}{'of matrix rate':>16}{'memory':>10}"]
    for variant in (*VARIANTS, SIDE_BY_SIDE):
        if variant not in measured:
            continue
        row = measured[variant]
        memory = f"{row['memory_bytes'] / 1e6:>7.0f} MB" if "memory_bytes" in row else ""
        lines.append(
            f"{variant:20}{row['seconds']:>9.3f}{row['clips_per_s']:>9.2f}{row['gflops']:>10.0f}"
            f"{row['share_of_matrix_rate']:>16.2f}{memory}"
        )
    rates = ", ".join(f"{name} {max(found.values()):.0f}" for name, found in measured["matrix_gflops"].items())
    return [*lines, f"matrix rate in GFLOP/s: {rates}", ""]


def claims(result: dict[str, Any]) -> dict[str, float]:
    """The results that the project promises, and the limits of this machine."""
    gpu = {}
    if "cuda" in result:
        shares = [measured["ours bfloat16"]["share_of_matrix_rate"] for measured in result["cuda"].values()]
        gpu = {"CUDA, bfloat16 share of the matrix rate, best batch (reach 0.5)": max(shares)}
    if VARIANTS[0] not in result:
        return gpu
    plain, full, half = (result[variant] for variant in VARIANTS)
    found = {"float32 against plain float32, times faster (reach 1.0)": plain["seconds"] / full["seconds"]}
    if bfloat16_instructions():
        share = half["share_of_matrix_rate"]
        found["bfloat16 against plain float32, times faster (reach 2.8)"] = plain["seconds"] / half["seconds"]
        found["the same at the whole matrix rate of bfloat16, the most this machine allows"] = plain["seconds"] / (
            half["seconds"] * share
        )
        found["bfloat16 share of the matrix rate (reach 0.85)"] = share
        beside = result[SIDE_BY_SIDE]
        gain = beside["clips_per_s"] / plain["clips_per_s"]
        found["the same a clip a core, as stage one encodes: times faster"] = gain
        found["the same a clip a core: share of the matrix rate"] = beside["share_of_matrix_rate"]
    if "memory_bytes" in half:
        found["float32 memory against plain (at most 0.5)"] = full["memory_bytes"] / plain["memory_bytes"]
        found["bfloat16 memory against plain (at most 0.5)"] = half["memory_bytes"] / plain["memory_bytes"]
    return found | gpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cuda-only", action="store_true", help="leave out what a CPU takes minutes for")
    add_result_arguments(parser, "encoder.json", "two frames, one narrow block, one round")
    parser.add_argument("--memory-of", choices=VARIANTS, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.frames, options.depth, options.width, options.rounds = 2, 1, 192, 1
    work = Work(options.frames, options.depth, options.batch, options.width)
    if options.memory_of:
        print(_memory_of(options.memory_of, work))
        return 0
    rounds, squares = options.rounds, QUICK_SQUARES if options.quick else SQUARES
    result: dict[str, Any] = {}
    with torch.inference_mode():
        if not options.cuda_only:
            result = measure(work, rounds, "cpu", (*VARIANTS, SIDE_BY_SIDE), squares)
            for variant in VARIANTS:
                result[variant]["memory_bytes"] = peak_memory(variant, work)
        if torch.cuda.is_available():
            result["cuda"] = {
                batch: measure(Work(work.frames, work.depth, batch), rounds, "cuda", VARIANTS[1:], squares)
                for batch in CUDA_BATCHES
            }
    result |= {"claims": claims(result), "work": asdict(work), "gflop": work.flops() / 1e9, "machine": stamp()}
    print(report(result))
    write_result(options, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
