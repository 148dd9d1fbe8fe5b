"""Start one small sweep several times at once: every start must end with exit code 0 and print the same results.

    python -m train bench double_starts [--rounds 200] [--starts 2] [--seed 0] [--quick] [--out FILE]

A round starts the same command in processes of their own, each after a random delay: half of the rounds within 50 ms,
the other half at any time of a lone sweep. The processes are forked from one that has imported everything, because
imports would take most of the time. The sweep has one run for each process that it trains in, so whichever start trains
a run computes it alike, and results must be those of a lone sweep to the last digit. Writes
benchmarks/results/double_starts.json and exits with 1 where a start failed or a result differs.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

import torch  # noqa: E402
import yaml  # noqa: E402

from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402
from egopatch.configs.schema import Config  # noqa: E402
from egopatch.train.__main__ import main as train  # noqa: E402
from egopatch.train.fitting.fit import fit  # noqa: E402
from egopatch.train.rundir.run_folder import plain  # noqa: E402
from egopatch.train.sweeps.sweep import run_sweep  # noqa: E402
from egopatch.train.sweeps.sweep_results import describe  # noqa: E402
from tests.train.tiny import with_run, write_tiny  # noqa: E402

RATIOS = (0.25, 0.5)
CLOSE_S = 0.05
# Entries of `sweep.json` that do not depend on who trained the sweep and how long that took.
RESULTS = ("planned", "members", "points", "comparisons")


def start(args: Sequence[str], delay: float, log: Path) -> int:
    """Run `python -m train ARGS` after a delay, in a forked process; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            time.sleep(delay)
            code = train(args)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def faults(folder: Path, expected: dict[str, Any]) -> list[str]:
    """Faults of the finished sweep in `folder`, one line each."""
    result = json.loads((folder / "sweep.json").read_text())
    found = [f"{name} differs from a lone sweep" for name in RESULTS if result[name] != expected[name]]
    return found + [f"{path.relative_to(folder)} is left over" for path in leftovers(folder)]


def leftovers(folder: Path) -> list[Path]:
    """Temporary files, leases and files to resume the groups from."""
    hidden, leases = folder.rglob(".*"), folder.glob("*/leases/*.json*")
    return [*hidden, *leases, *(folder / "crews").iterdir()]


def _last_results(text: str) -> list[str]:
    """The lines that a sweep ends with: its results, indented, and its file; notes may follow them."""
    lines = text.splitlines()
    while lines and lines[-1].startswith("note: "):
        lines.pop()
    first = max(0, len(lines) - 1)
    while first > 0 and lines[first - 1].startswith("  "):
        first -= 1
    return lines[first:]


def run_round(config: Path, out: Path, delays: Sequence[float], expected: dict[str, Any]) -> list[str]:
    """One round in the folder `out`; returns what was wrong, with the output of each start that went wrong."""
    logs = [out.parent / f"{out.name}-{number}.log" for number in range(len(delays))]
    args = ["sweep", "--config", str(config), "--ratios", *map(str, RATIOS), "--name", out.name]
    children = [start(args, delay, log) for delay, log in zip(delays, logs, strict=True)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    printed = [log.read_text() for log in logs]
    wrong = [f"exit code {code}: {text}" for code, text in zip(codes, printed, strict=True) if code]
    lines = [*describe(expected), f"{out}/sweep.json"]
    wrong += [f"not the results of a lone sweep: {text}" for text in printed if _last_results(text) != lines]
    return wrong or faults(out, expected)


def warm(config: Config) -> None:
    """Train once, so that everything is imported, on one thread: a process with more cannot be forked safely."""
    torch.set_num_threads(1)
    fit(config, "warm")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--starts", type=int, default=2, help="simultaneous starts of a round")
    parser.add_argument("--seed", type=int, default=0, help="seed of the delays")
    add_result_arguments(parser, "double_starts.json", "two rounds")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds = 2
    print(f"{args.rounds} rounds of {args.starts} starts, seed {args.seed}", flush=True)
    rng, failed, seconds = random.Random(args.seed), {}, []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = with_run(write_tiny(root, clips=12), "psa", train_epochs=1)
        warm(with_run(config, "warm"))
        path = root / "config.yaml"
        path.write_text(yaml.safe_dump(plain(config)))
        torch.set_num_threads(len(RATIOS))  # the number of processes that a sweep trains in
        began = time.monotonic()
        lone = run_sweep(config, ratios=RATIOS, name="lone")
        alone_s = time.monotonic() - began
        expected = json.loads(lone.read_text())
        for number in range(args.rounds):
            within = CLOSE_S if number % 2 else alone_s
            delays = [rng.uniform(0, within) for _ in range(args.starts)]
            out = lone.parent.parent / f"round{number}"
            began = time.monotonic()
            if wrong := run_round(path, out, delays, expected):
                failed[number] = {"delays_s": delays, "wrong": wrong}
                print(f"round {number}, delays {delays}: {'; '.join(wrong)}", file=sys.stderr, flush=True)
            else:
                shutil.rmtree(out)
            seconds.append(time.monotonic() - began)
            if number % 20 == 19:
                print(f"{number + 1} rounds, {len(failed)} failed, {sum(seconds):.0f} s", flush=True)
    result = {
        "what": "starts of one sweep at the same time; a round passes if all exit with 0 and the results of a lone one",
        "rounds": args.rounds,
        "starts": args.starts,
        "seed": args.seed,
        "passed": args.rounds - len(failed),
        "failed": failed,
        "seconds": {"lone": round(alone_s, 2), "round_mean": round(sum(seconds) / max(1, len(seconds)), 2)},
        "machine": stamp(),
    }
    write_result(args, result)
    print(f"{result['passed']} of {args.rounds} rounds passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
