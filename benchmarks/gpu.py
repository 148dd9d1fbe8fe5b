"""Everything that only a GPU can prove, by one command, in about ten minutes.

    make gpu                                     all parts that have no result yet
    python benchmarks/gpu.py [--part NAME ...]   these parts, again
    python benchmarks/gpu.py --dry-run           tiny sizes on a CPU, kernels in Triton's interpreter, nothing kept

Each part is a command of its own; its output and its JSON are written to --out as it ends, so an interrupted run
resumes with the next part. `summary.md` sets each goal beside its figure. It needs no network. Exit code 1 if a part
failed or a goal was missed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import RESULTS, stamp  # noqa: E402

Rows = list[tuple[str, float, str]]


@dataclass(frozen=True)
class Part:
    """A command and what its result must show.

    Attributes:
        name: Name on the command line and of its files.
        command: The command on a GPU; `{out}` is its JSON file.
        dry: The command with tiny sizes on a CPU.
        goals: Rows (what, figure, goal) from its JSON; a goal begins with `>=`, `<=` or is empty.
        seconds: Limit of its time.
    """

    name: str
    command: tuple[str, ...]
    dry: tuple[str, ...]
    goals: Callable[[Any], Rows] = lambda _: []
    seconds: int = 240


def kernel_goals(result: Any) -> Rows:
    rows: Rows = []
    for at in result["results"]:
        ours, ratio = at["variants"]["ours"], f"ratio {at['ratio']:g}"
        rows.append(
            (f"forward, {ratio}: token bytes over time, share of copy", ours["forward"]["share_of_copy"], ">= 0.8")
        )
        if "compiled" in at["variants"]:
            times = at["variants"]["compiled"]["both"]["milliseconds"] / ours["both"]["milliseconds"]
            rows.append((f"forward and backward, {ratio}: times faster than the compiled definition", times, ">= 4"))
        rows.append((f"forward, {ratio}: ms", ours["forward"]["milliseconds"], ""))
        rows.append((f"forward and backward, {ratio}: ms", ours["both"]["milliseconds"], ""))
    return rows


def encoder_goals(result: Any) -> Rows:
    rows: Rows = []
    for batch, measured in result["cuda"].items():
        found = measured["ours bfloat16"]
        rows.append((f"encoder, batch {batch}: clips/s", found["clips_per_s"], ""))
        goal = ">= 0.5" if int(batch) >= 8 else ""
        rows.append((f"encoder, batch {batch}: share of the matrix rate", found["share_of_matrix_rate"], goal))
    return rows


def step_goals(result: Any) -> Rows:
    eager, one, many = result["steps"]
    return [
        ("a step of one head without a graph: ms", eager["milliseconds"], ""),
        ("a step of one head: ms", one["milliseconds"], ""),
        ("a step of one head: GPU busy", one["busy_share"], ">= 0.8"),
        ("a step of one head: launches", one["launches"], ""),
        (f"a step of {many['heads']} heads: in steps of one", many["milliseconds"] / one["milliseconds"], ""),
    ]


def stage_one_goals(result: Any) -> Rows:
    rows: Rows = [
        ("encoder alone: clips/s", result["encoder_alone_clips_per_s"], ""),
        ("bare decoding on all cores: clips/s", result["bare_decoding_clips_per_s"], ""),
    ]
    for which, share in result["share_of_the_slower"].items():
        rows.append((f"whole pipeline {which}, share of the slower of these", share, ">= 0.9"))
        rows.append(("the same from the first batch on", result["steady_share_of_the_slower"][which], ""))
    return rows


# Only the files that have CUDA tests, since others import packages that need not be installed on a GPU node.
FILES = sorted(ROOT.glob("tests/**/test_*.py"))
# The second alternative is the fixture that runs a test on the CPU and on a GPU.
MARKED = re.compile(r"mark\.cuda|\bdevice: torch\.device")
CUDA_FILES = tuple(str(file.relative_to(ROOT)) for file in FILES if MARKED.search(file.read_text()))
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "cuda")
# One test at a time leaves the GPU idle while a CPU makes videos and starts children.
AT_ONCE = ("-n", "10", "--dist", "loadfile") if find_spec("xdist") else ()
SCRIPTS = {name: (sys.executable, f"benchmarks/{name}.py") for name in
           ("select_attend", "encoder", "gpu_stage_one", "gpu_step", "gpu_small", "nvdec")}  # fmt: skip
OUT = ("--out", "{out}")
PARTS = (
    # Half of them took 177 s, 16 at a time.
    Part("tests", (*PYTEST, *AT_ONCE, *CUDA_FILES), (*PYTEST, *CUDA_FILES), seconds=600),
    Part("races", ("compute-sanitizer", "--tool", "racecheck", *SCRIPTS["gpu_small"]), SCRIPTS["gpu_small"]),
    Part(
        "memory",
        ("compute-sanitizer", "--tool", "memcheck", *SCRIPTS["gpu_small"]),
        (*SCRIPTS["gpu_small"], "--help"),
    ),
    Part(
        "one_question",
        (*SCRIPTS["select_attend"], "--preset", "one", "--ratios", "0.25", "--rounds", "9", "--variants", "ours", *OUT),
        (*SCRIPTS["select_attend"], "--help"),
        kernel_goals,
    ),
    Part(
        "kernels",
        (*SCRIPTS["select_attend"], "--preset", "batch", "--ratios", "0.25", "--rounds", "9", *OUT),
        (*SCRIPTS["select_attend"], "--preset", "frame", "--ratios", "0.25", "--rounds", "2", *OUT),
        kernel_goals,
        300,  # the definition alone takes two minutes to compile
    ),
    Part("encoder", (*SCRIPTS["encoder"], "--cuda-only", *OUT), (*SCRIPTS["encoder"], "--quick", *OUT), encoder_goals),
    Part("step", (*SCRIPTS["gpu_step"], *OUT), (*SCRIPTS["gpu_step"], "--quick", *OUT), step_goals),
    Part(
        "stage_one",
        (*SCRIPTS["gpu_stage_one"], *OUT),
        (*SCRIPTS["gpu_stage_one"], "--quick", *OUT),
        stage_one_goals,
    ),
    Part("nvdec", (*SCRIPTS["nvdec"], *OUT), (*SCRIPTS["nvdec"], "--help")),
)  # fmt: skip


def run_part(part: Part, folder: Path, dry: bool) -> bool:
    """Run a part; its output goes to NAME.txt and a record of it to NAME.part.json."""
    json_file, log = folder / f"{part.name}.json", folder / f"{part.name}.txt"
    command = [word.replace("{out}", str(json_file)) for word in (part.dry if dry else part.command)]
    if shutil.which(command[0]) is None:
        log.write_text(f"{command[0]} is not installed\n")
        print(f"{part.name}: not run, {command[0]} is not installed", flush=True)
        return False
    environment = os.environ | (
        {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {"FAIL_WITHOUT_CUDA": "1"}
    )
    started = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=part.seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    seconds = time.monotonic() - started
    record = {"part": part.name, "exit_code": code, "seconds": round(seconds, 1)}
    (folder / f"{part.name}.part.json").write_text(json.dumps(record) + "\n")
    print(f"{part.name}: exit code {code} after {seconds:.0f} s; see {log}", flush=True)
    return code in ((0, 5) if dry else (0,))  # 5: pytest found only tests to skip


def summary(folder: Path, machine: Mapping[str, Any]) -> tuple[str, bool]:
    """The summary in Markdown, and whether all goals are met."""
    facts = {name: value for name, value in machine.items() if name != "versions"} | machine["versions"]
    lines = [f"# {machine['gpu']}", "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += ["| part | what | figure | goal | |", "|---|---|--:|---|---|"]
    met = True
    for part in PARTS:
        record_file, json_file = folder / f"{part.name}.part.json", folder / f"{part.name}.json"
        if not record_file.exists():
            lines.append(f"| {part.name} | not run | | | |")
            continue
        record = json.loads(record_file.read_text())
        good = record["exit_code"] == 0
        lines.append(f"| {part.name} | exit code | {record['exit_code']} | 0 | {'' if good else 'MISSED'} |")
        met &= good
        if not json_file.exists():
            continue
        for what, figure, goal in part.goals(json.loads(json_file.read_text())):
            ok = not goal or (figure >= float(goal[2:]) if goal.startswith(">=") else figure <= float(goal[2:]))
            met &= ok
            lines.append(f"| | {what} | {figure:.3g} | {goal} | {'' if ok else 'MISSED'} |")
    return "\n".join(lines) + "\n", met


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=[part.name for part in PARTS], help="only these, also if done")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results/gpu_NAME")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu: torch sees no CUDA device; expected one, or --dry-run", file=sys.stderr)
        return 2
    machine = stamp("triton", "transformers")
    name = str(machine["gpu"] or "dry_run").lower().replace(" ", "_")
    folder: Path = args.out or (ROOT / "runs" / "gpu_dry_run" if args.dry_run else RESULTS / f"gpu_{name}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")
    good = True
    for part in PARTS:
        done = (folder / f"{part.name}.part.json").exists() and not args.dry_run
        if part.name in args.part if args.part else not done:
            good &= run_part(part, folder, args.dry_run)
    if args.dry_run:
        return 0 if good else 1
    text, met = summary(folder, machine)
    (folder / "summary.md").write_text(text)
    print(text)
    return 0 if good and met else 1


if __name__ == "__main__":
    sys.exit(main())
