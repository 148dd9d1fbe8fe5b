"""`select_attend` compared with other implementations: forward, backward and both, over selection ratios.

    python benchmarks/select_attend.py [--preset small|batch|one] [--heads 4] [--ratios 0.05 0.25 1.0]
        [--variants ours compiled] [--out FILE.json]

    ours       the Triton kernels on a GPU, the chunked reference on a CPU
    eager      the definition in plain PyTorch, which copies the clip of every question
    compiled   the same through torch.compile
    dense      keys and values projected, masked scaled_dot_product_attention (the projections' time included)
    flex       the same with FlexAttention and a mask of the kept patches; GPU only

Variants run in one process, on random data; on a CPU they take turns. On a GPU each is a CUDA graph, as in a training
step, so that no time of the host counts, and the L2 cache is flushed before each replay. The report has medians with
quartiles, the peak memory beyond the inputs (GPU), the token bytes (counted once) over time, and the ratio of that to
the copy bandwidth measured in the same run. Outputs of variants with the same projections are compared first. --out is
written after each ratio, and a plot of time over ratio beside it.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn import functional
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._machine import add_result_arguments, stamp, write_result
from egopatch.train.ops.select_attend import choose_implementation, reference, select_attend

# clips, questions of each clip, frames, patches, channels
PRESETS = {
    "frame": (1, 1, 1, 196, 768),
    "small": (4, 17, 4, 196, 768),
    "batch": (64, 17, 16, 196, 768),
    "one": (64, 1, 16, 196, 768),
}
# Variants that copy the clip of every question are left out above this many bytes of copies.
LARGEST_EXPANSION = {"cpu": 4 * 2**30, "cuda": 48 * 2**30}
Outputs = tuple[Tensor, ...]


class Problem:
    """Inputs, and each variant as a function of (queries, selector, bias)."""

    def __init__(self, preset: str, heads: int, ratio: float, device: str) -> None:
        clips, each, frames, patches, width = PRESETS[preset]
        gen = torch.Generator(device).manual_seed(0)
        make = lambda *shape: torch.randn(*shape, generator=gen, device=device)  # noqa: E731
        self.k = math.ceil(ratio * patches)
        self.heads = heads
        self.tokens = torch.stack([make(frames, patches, width).half() for _ in range(clips)])
        self.clip_index = torch.arange(clips, device=device).repeat_interleave(each)
        b = clips * each
        queries, selector, bias = make(b, heads, width), make(b, width), make(clips, frames, patches)
        leaves = [queries.div_(math.sqrt(width)), selector.div_(math.sqrt(width)), bias]
        self.leaves = [leaf.requires_grad_() for leaf in leaves]
        self.sdpa = "not run"  # backend that `dense` ran on
        self.project = torch.nn.Linear(width, 2 * width, bias=False, device=device)
        self.token_bytes = self.tokens.numel() * self.tokens.element_size()
        self.expanded_bytes = b * frames * patches * width * 4 * 3

    def ours(self, *leaves: Tensor) -> Outputs:
        return tuple(select_attend(self.tokens, self.clip_index, *leaves, self.k)[:2])

    def eager(self, *leaves: Tensor) -> Outputs:
        return reference.specification(self.tokens, self.clip_index, *leaves, self.k)[:2]

    def kept_mask(self, selector: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, T, N] and which patches are dropped."""
        x = self.tokens.to(selector.dtype)
        c = len(x)
        scores = torch.einsum("cqd,ctnd->cqtn", selector.view(c, -1, x.shape[-1]), x) + bias[:, None]
        scores = scores.flatten(0, 1)
        kept = scores.detach().topk(self.k, dim=-1).indices
        return scores, torch.ones_like(scores, dtype=torch.bool).scatter_(2, kept, False)

    def keys_values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values, each [B * T, H, N, E]."""
        both = functional.linear(self.tokens.to(dtype), self.project.weight.to(dtype))
        keys, values = (
            half.unflatten(3, (self.heads, -1)).transpose(2, 3)[self.clip_index].flatten(0, 1)
            for half in both.chunk(2, dim=-1)
        )
        return keys, values

    def dense(self, queries: Tensor, selector: Tensor, bias: Tensor) -> Outputs:
        dtype = torch.float16 if queries.is_cuda else torch.float32
        scores, dropped = self.kept_mask(selector.to(dtype), bias.to(dtype))
        keys, values = self.keys_values(dtype)
        frames = scores.shape[1]
        q = queries.to(dtype)[..., : keys.shape[-1]].repeat_interleave(frames, dim=0)[:, :, None]
        mask = scores.masked_fill(dropped, -torch.inf).flatten(0, 1)[:, None, None]
        self.sdpa = SDPBackend(torch._fused_sdp_choice(q, keys, values, attn_mask=mask)).name
        return (functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask),)

    def flex(self, queries: Tensor, selector: Tensor, bias: Tensor) -> Outputs:
        from torch.nn.attention.flex_attention import flex_attention

        scores, dropped = self.kept_mask(selector.half(), bias.half())
        keys, values = self.keys_values(torch.float16)
        frames = scores.shape[1]
        q = queries.half()[..., : keys.shape[-1]].repeat_interleave(frames, dim=0)[:, :, None]
        flat = scores.masked_fill(dropped, -torch.inf).flatten(0, 1)

        def add_score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, n: Tensor) -> Tensor:
            return logit + flat[b, n]

        return (flex_attention(q, keys, values, score_mod=add_score),)


VARIANTS = ("ours", "eager", "compiled", "dense", "flex")


def variants(problem: Problem, device: str, names: Sequence[str]) -> dict[str, Callable[..., Outputs]]:
    """The variants in `names` that this device can run and that fit in memory, by name."""
    found: dict[str, Callable[..., Outputs]] = {"ours": problem.ours}
    if problem.expanded_bytes <= LARGEST_EXPANSION[device]:
        found |= {"eager": problem.eager, "compiled": torch.compile(problem.eager), "dense": problem.dense}
        if device == "cuda":
            found["flex"] = torch.compile(problem.flex)
    return {name: call for name, call in found.items() if name in names}


def milliseconds(call: Callable[[], object], device: str, flush: Tensor) -> float:
    """Time of one call, with the caches flushed before it on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    flush.zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def copy_bandwidth(device: str, flush: Tensor) -> float:
    """GB/s that a copy reads and writes."""
    source = torch.empty(2**28 if device == "cpu" else 2**30, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), device, flush) for _ in range(9)]
    return 2 * source.numel() / statistics.median(times[2:]) / 1e6


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """Capture the call as a CUDA graph; returns a function that replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return lambda: (graph.replay(), kept)


def steps_of(problem: Problem, name: str, call: Callable[..., Outputs], device: str) -> dict[str, Callable[[], object]]:
    """The variant's forward alone, its backward alone, and both."""
    outputs = call(*problem.leaves)
    grads = [torch.randn_like(o) for o in outputs]
    if device == "cuda":
        outputs = ()  # backward is not timed alone there; its saved tensors would take memory from other variants
    wanted = [*problem.leaves, problem.project.weight] if name in ("dense", "flex") else problem.leaves

    def forward() -> Outputs:
        with torch.no_grad():
            return call(*problem.leaves)

    def backward() -> object:
        return torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    def both() -> object:
        # Fresh leaves: the earlier ones belong to the stream that they were made on, which a graph may not use.
        leaves = [leaf.detach().requires_grad_() for leaf in problem.leaves]
        return torch.autograd.grad(call(*leaves), [*leaves, *wanted[len(leaves) :]], grads)

    return {"forward": forward, "backward": backward, "both": both}


def measure(
    problem: Problem, device: str, names: Sequence[str], rounds: int, copy: float, flush: Tensor
) -> dict[str, dict[str, object]]:
    calls = variants(problem, device, names)
    if "eager" in calls:
        for ours, theirs in zip(problem.ours(*problem.leaves), problem.eager(*problem.leaves), strict=True):
            # Patches whose scores float32 cannot tell apart may be selected differently.
            wrong = (~torch.isclose(ours, theirs, rtol=1e-2, atol=1e-2)).double().mean().item()
            if wrong > 1e-4:
                raise AssertionError(f"a share of {wrong:.1e} of the results differs from eager's")
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    peaks: dict[str, int] = {}
    for name, call in calls.items():
        parts = steps_of(problem, name, call, device)
        steps |= {(name, part): step for part, step in parts.items()}
        parts["forward"]()  # without gradients torch.compile makes another graph
        parts["both"]()
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            parts["both"]()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    if device == "cuda":
        for key, step in steps.items():
            if key[1] != "backward":  # a graph of it would belong to the stream of its forward
                replay = graph_of(step)
                times[key] = [milliseconds(replay, device, flush) for _ in range(rounds)]
                del replay
                torch.cuda.empty_cache()
    else:
        for _ in range(rounds):
            for key, step in steps.items():
                times[key].append(milliseconds(step, device, flush))
    rows: dict[str, dict[str, object]] = {}
    for (name, part), taken in times.items():
        if not taken:
            continue
        low, median, high = statistics.quantiles(taken, n=4)
        rate = problem.token_bytes / median / 1e6
        rows.setdefault(name, {})[part] = {
            "milliseconds": median,
            "quartiles": [low, high],
            "token_gb_per_s": rate,
            "share_of_copy": rate / copy,
        }
    for name, peak in peaks.items():
        rows[name]["peak_bytes"] = peak
        rows[name]["peak_share_of_tokens"] = peak / problem.token_bytes
    return rows


def plot(results: list[dict[str, object]], file: Path) -> None:
    """Time of forward and backward against the ratio."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in sorted({name for r in results for name in r["variants"]}):
        points = [(r["ratio"], r["variants"][name]["both"]["milliseconds"]) for r in results if name in r["variants"]]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel="selection ratio", ylabel="forward and backward, ms", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="batch" if torch.cuda.is_available() else "small")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=25 if torch.cuda.is_available() else 5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    add_result_arguments(parser, None, "one frame, one ratio, two rounds, nothing compiled")
    args = parser.parse_args()
    if args.quick:
        args.preset, args.ratios, args.rounds = "frame", args.ratios[:1], 2
        args.variants = [name for name in args.variants if name != "compiled"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    functorch_config.donated_buffer = False  # backward is timed alone, several times over one forward
    flush = torch.empty(2**28 if device == "cuda" else 0, dtype=torch.uint8, device=device)
    copy = copy_bandwidth(device, flush)
    implementation, _ = choose_implementation(torch.empty(1, 1, 196, 768, device=device), torch.float32, "auto")
    print(f"{device}: copy {copy:.0f} GB/s; {args.preset} {PRESETS[args.preset]}, {args.heads} heads")
    results: list[dict[str, object]] = []
    for ratio in args.ratios:
        problem = Problem(args.preset, args.heads, ratio, device)
        rows = measure(problem, device, args.variants, args.rounds, copy, flush)
        if "dense" in rows:
            rows["dense"]["backend"] = problem.sdpa
        results.append({"ratio": ratio, "k": problem.k, "token_bytes": problem.token_bytes, "variants": rows})
        for name, row in rows.items():
            timed = [part for part in ("forward", "backward", "both") if part in row]
            parts = "  ".join(f"{part} {row[part]['milliseconds']:9.3f} ms" for part in timed)
            share = row["forward"]["share_of_copy"]
            print(f"ratio {ratio:4.2f}  {name:9} {parts}   forward reads tokens at {share:.1%} of copy", flush=True)
        if out := write_result(args, report(args, implementation, copy, results)):
            plot(results, out.with_suffix(".png"))
    return 0


def report(
    args: argparse.Namespace, implementation: str, copy: float, results: list[dict[str, object]]
) -> dict[str, object]:
    """The results, with their settings and machine."""
    return {
        "benchmark": "select_attend",
        "preset": args.preset,
        "shape": dict(zip(("C", "questions_of_each", "T", "N", "D"), PRESETS[args.preset], strict=True)),
        "heads": args.heads,
        "implementation": implementation,
        "copy_gb_per_s": copy,
        "results": results,
        "machine": stamp("triton"),
    }


if __name__ == "__main__":
    sys.exit(main())
