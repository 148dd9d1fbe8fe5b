"""`egopatch demo`: EgoSynth end to end, from rendered videos to a table and a report, by the commands that users run.

EgoVLP's and EgoVLPv2's weights are random here, and the videos are rendered: the demo shows that the pipeline runs end
to end, and says nothing about the published networks.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TextIO

import yaml

from egopatch.configs.command_line import StageParser
from egopatch.configs.packaged import packaged_config
from egopatch.features.common.command_line import messages_apart, print_result
from egopatch.features.common.machine import usable_cores
from egopatch.features.io.files import replacing

SPLITS = ("direct", "indirect")
ENCODERS = ("egovlpv2", "egovlp", "lite")
FULL, SMALL = Path("runs/demo"), Path("runs/demo-small")
# psa converges with eight heads, much weight decay and, on the stand-in, a high rate without dropout
# (docs/egosynth_training.md); the other heads keep these settings.
BASELINE = (
    "--head.heads", "4", "--head.dropout", "0.1",
    "--train.weight_decay", "0.05", "--train.lr", "1e-3",
)  # fmt: skip

Command = tuple[str, ...]


def main(args: Sequence[str]) -> int:
    """Run the demo; returns the exit code of the first command that fails, or 0."""
    parser = StageParser(
        prog="egopatch demo", description="run everything on EgoSynth, rendered here: no data, downloads or GPU needed"
    )
    parser.add_argument("--small", action="store_true", help="24 clips and two systems, under a minute")
    parser.add_argument(
        "--out", type=Path | None, default=None, metavar="DIR",
        help=f"folder to write; by default {FULL}, or {SMALL} with --small",
    )  # fmt: skip
    parser.add_argument(
        "--train-only", choices=SPLITS, help="only train the systems of one split, on stores that the demo has made"
    )
    options = parser.parse_args(list(args))
    recipe = Recipe(options.out or (SMALL if options.small else FULL))
    with messages_apart(options.json):
        if options.train_only:
            return _run_here(recipe.training(options.train_only))
        recipe.write_configs()
        code = _run_here(recipe.small()) if options.small else _run_full(recipe, sys.stderr if options.json else None)
    if code == 0:
        run, rows = recipe.out / "direct" / "psa-lite", json.loads((recipe.out / "table.json").read_text())
        report = None if options.small else recipe.out / "report.html"
        print_result(
            options.json,
            {"file": recipe.out / "table.md", "rows": rows, "report": report, "run": run},
            f'next: egopatch ask --video FILE "what does the person pick up?" --run {shlex.quote(str(run))}',
        )
    return code


@dataclass(frozen=True)
class Recipe:
    """The demo's commands, which write to `out`, without the leading `egopatch`."""

    out: Path

    def write_configs(self) -> None:
        """Write the demo's packaged experiments with paths below `out`."""
        for name in ENCODERS:
            packaged = yaml.safe_load(packaged_config(f"demo/{name}").read_text(encoding="utf-8"))
            experiment = {
                section: {option: self._below_out(value) for option, value in options.items()}
                for section, options in packaged.items()
            }
            with replacing(self._config(name)) as file:
                file.write_text(yaml.safe_dump(experiment, sort_keys=False, default_flow_style=None), encoding="utf-8")

    def _below_out(self, value: object) -> object:
        if isinstance(value, str) and Path(value).is_relative_to(FULL):
            return str(self.out / Path(value).relative_to(FULL))
        return value

    def small(self) -> list[Command]:
        """One store, two systems and a table."""
        lite, epochs = self._options("lite"), ("--train.epochs", "2")
        return [
            ("extract", "synth", "--out", f"{self.out}/data", "--clips", "24"),
            ("extract", "run", *lite),
            ("train", "fit", *lite, *self._run("direct/question-only"), "--head.name", "question-only", *epochs),
            ("train", "fit", *lite, *self._run("direct/psa-lite"), *epochs),
            ("train", "table", *lite),
        ]

    def features(self) -> list[Command]:
        """Videos, checkpoints, and the stores of all encoders from one decode of each video."""
        commands: list[Command] = [("extract", "synth", "--out", f"{self.out}/data", "--clips", "800")]
        commands += [("extract", "standin", *self._options(name)) for name in ("egovlpv2", "egovlp")]
        return [*commands, ("extract", "run", "--config", *(str(self._config(name)) for name in ENCODERS))]

    def training(self, split: str) -> list[Command]:
        """The systems on one split: five on random-weight stand-ins, two on real ImageNet weights."""

        def fit(config: str, name: str, *options: str) -> Command:
            return ("train", "fit", *self._options(config, split), *self._run(f"{split}/{name}"), *options)

        return [
            *(fit("egovlpv2", model, "--head.name", model, *BASELINE) for model in ("majority", "question-only")),
            fit("egovlpv2", "psa"),
            fit("egovlpv2", "egovlpv2", "--head.name", "egovlpv2", *BASELINE, "--train.epochs", "6"),
            fit("egovlp", "egovlp"),
            fit("lite", "pooled-lite", "--head.name", "pooled", *BASELINE),
            fit("lite", "psa-lite"),
            ("train", "explain", *self._options("lite", split), *self._run(f"{split}/psa-lite"), "--questions", "64"),
        ]

    def results(self) -> list[Command]:
        """A sweep of the selection ratio, the table and the report."""
        options = (*self._options("egovlpv2"), *self._run("direct/psa"))
        sweep = ("train", "sweep", *options, "--ratios", "0.1", "0.25", "1.0")
        return [sweep, ("train", "table", *options), ("train", "report", *options)]

    def _options(self, name: str, split: str = "direct") -> Command:
        return ("--config", str(self._config(name)), "--data.split", split)

    def _config(self, name: str) -> Path:
        return self.out / "configs" / f"{name}.yaml"

    def _run(self, name: str) -> Command:
        return ("--run.dir", f"{self.out}/{name}")


def _run_full(recipe: Recipe, stdout: TextIO | None) -> int:
    """Run the whole demo; `stdout` is that of its processes."""
    if code := _run_here(recipe.features()):
        return code
    # Small heads gain little from a second core, so the two splits train in parallel.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def train(split: str) -> int:
        command = [sys.executable, "-m", "egopatch", "demo", "--out", str(recipe.out), "--train-only", split]
        return subprocess.run(command, env=environment, stdout=stdout).returncode

    with ThreadPoolExecutor(max_workers=min(usable_cores(), len(SPLITS))) as pool:
        codes = list(pool.map(train, SPLITS))
    return next(filter(None, codes), 0) or _run_here(recipe.results())


def _run_here(commands: Sequence[Command]) -> int:
    """Run commands in this process, which imports torch once; returns the exit code of the first that fails."""
    for stage, *args in commands:
        print(f"$ egopatch {shlex.join((stage, *args))}", flush=True)
        if code := import_module(f"egopatch.{stage}.__main__").main(args):
            return int(code)
    return 0
