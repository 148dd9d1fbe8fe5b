"""EgoSynth: every system with its interval, every part of psa switched off, and accuracy against the selection ratio.

    python benchmarks/egosynth.py                                    the plain set of `make demo`: the table
    python benchmarks/egosynth.py --set hard --parts table ratios stores ablation

A set is rendered and encoded once, then every system trains with every seed, by the commands and configs that a user
has. What is finished is not done again, so that the same command goes on after any interruption. Intervals are over
seeds and clips, comparisons are paired by question (train/scores/statistics.py). Checkpoints are chosen on
val; nothing is chosen on test. Writes benchmarks/results/egosynth.json or egosynth_hard.json, for the ratios a picture
beside it, and the tables and findings of docs/egosynth.md between its markers.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks._egosynth_cost import cost_of
from benchmarks._egosynth_docs import NUMBERS, REFERENCE, SPLITS, markdown, write_docs
from benchmarks._egosynth_systems import (
    ABLATION,
    COPIES,
    ENCODERS,
    PARAPHRASES,
    SEARCHED,
    SHORTER,
    SOURCES,
    SYSTEMS,
    WHOLE,
)
from benchmarks._egosynth_wordings import disagreements
from egopatch.configs.command_line import ConfigParser, add_config_arguments, load_config, parse_config
from egopatch.configs.schema import Config
from egopatch.extract.datasets import load_dataset
from egopatch.features import open_store
from egopatch.train.explanation.explain import explain
from egopatch.train.explanation.record import read_explanation
from egopatch.train.report import plots
from egopatch.train.report.agreement import agreement
from egopatch.train.report.answers import load_questions
from egopatch.train.report.sources import read_selection, read_sweep
from egopatch.train.scores.metrics import read_predictions, same_lower_cased
from egopatch.train.scores.statistics import compare
from egopatch.train.sweeps.sweep import run_sweep

RESULTS = Path(__file__).parent / "results"
RATIOS = (0.1, 0.25, 0.5, 1.0)
SEARCH = Path(__file__).parent / "egosynth_search.yaml"


class Bench:
    """One set: where it lies, its configs, and what has been trained on it."""

    def __init__(
        self, name: str, clips: int, seeds: Sequence[int], set_seed: int = 0, systems: Collection[str] = ()
    ) -> None:
        self.name, self.clips, self.seeds, self.set_seed = name, clips, list(seeds), set_seed
        self.root = Path("runs") / (f"egosynth_{name}" + (f"_{set_seed}" if set_seed else ""))
        chosen = [label for label in SYSTEMS if label in systems or not systems]
        # The demo has no MFAS.
        self.systems = [label for label in chosen if self.file(SYSTEMS[label].encoder).exists()]

    def file(self, encoder: str) -> Path:
        """The config of an encoder."""
        return Path("configs") / (f"demo/{encoder}.yaml" if self.name == "demo" else f"egosynth_hard_{encoder}.yaml")

    def config(self, encoder: str, split: str, *options: str) -> Config:
        """As the command line would read it, with everything below the set's own folder."""
        parser = ConfigParser(prog="egosynth")
        add_config_arguments(parser)
        return parse_config(parser, ["--config", str(self.file(encoder)), *self.places(encoder, split), *options])[0]

    def places(self, encoder: str, split: str) -> list[str]:
        weights = self.root / "weights"
        own = ["--data.root", self.root / "data", "--store.path", self.root / "stores" / encoder]
        own += ["--run.dir", self.root / split / encoder, "--run.table", self.root, "--data.split", split]
        if encoder != "lite":
            own += ["--encoder.checkpoint", weights / f"{encoder}-random.pth"]
            own += ["--text.model", weights / f"{encoder}-tokenizer"]
        return list(map(str, own))

    def encode(self, encoders: Collection[str]) -> None:
        """Render the set, and make the stores of these encoders; what is there stays."""
        if not (self.root / "data" / "events.jsonl").exists():
            hard, seed = ["--hard"] if self.name == "hard" else [], ["--seed", str(self.set_seed)]
            command("extract", "synth", "--out", str(self.root / "data"), "--clips", str(self.clips), *hard, *seed)
        for encoder in encoders:
            done = self.root / "stores" / f"{encoder}.done"
            if done.exists():
                continue
            given = ["--config", str(self.file(encoder)), *self.places(encoder, "direct"), *PARAPHRASES]
            if encoder != "lite":
                # MFAS starts from a checkpoint of EgoVLPv2.
                arch = "egovlpv2" if encoder == "mfas" else encoder
                command("extract", "standin", *given, "--encoder.arch", arch)
            command("extract", "run", *given)
            done.touch()

    def copy(self, label: str) -> Path:
        """The lite store, or a copy of it, which is made if it is not there."""
        path = self.root / "stores" / "lite"
        if not (how := COPIES[label].how):
            return path
        folder = path.with_name(f"lite-{slug(label)}")
        if not folder.exists():
            command("features", how[0], str(path), *how[1:], "--to", str(folder))
        return folder

    def copy_options(self, label: str) -> list[str]:
        """Options of a run on a copy of the lite store."""
        return ["--store.path", str(self.copy(label)), *COPIES[label].options, *SHORTER]

    def sweep(self, name: str, encoder: str, split: str, options: Sequence[str], setting: Mapping[str, Any]) -> None:
        """Train every seed of a setting that is not finished."""
        with grid_file({option: [value] for option, value in setting.items()}) as grid:
            run_sweep(
                self.config(encoder, split, *options), seeds=self.seeds, grid=grid if setting else None, name=name
            )

    def found(self, name: str) -> dict[str, Any] | None:
        """The point of a sweep of one setting, with its command's members; None where it is not finished."""
        path = self.root / "sweeps" / name / "sweep.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        done = len(result["members"]) == len(self.seeds)
        return {**result["points"][0], "members": result["members"], "name": name} if done else None

    def against(self, ours: Mapping[str, Any], theirs: Mapping[str, Any], split: str) -> dict[str, Any]:
        """The paired difference of two points, in points of accuracy over all questions."""
        questions = load_dataset(self.config("lite", split).data).questions["test"]
        right = []
        for point in (ours, theirs):
            folder = self.root / "sweeps" / point["name"]
            said = [read_predictions(folder / m["dir"] / "predictions.jsonl", questions) for m in point["members"]]
            right.append([[same_lower_cased(q, answers[q.question_id]) for q in questions] for answers in said])
        result = compare(*right, [question.clip_id for question in questions])
        difference = result.difference
        found: dict[str, Any] = {
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "p": result.p,
        }
        return {**rounded(found), "verdict": result.verdict}

    def disagreements(self, point: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
        """Wordings of questions that the seeds of a point disagree about, or cannot answer."""
        questions = load_dataset(self.config("lite", split).data).questions
        folders = [self.root / "sweeps" / point["name"] / member["dir"] for member in point["members"]]
        said = [read_predictions(folder / "predictions.jsonl", questions["test"]) for folder in folders]
        return disagreements(questions["train"], questions["test"], said)

    def agreement(self, point: Mapping[str, Any], split: str) -> dict[str, float] | None:
        """Whether the kept patches are where the objects stand that are asked about: percentages, mean over seeds."""
        config = self.config("lite", split)
        questions, grid = load_questions(config, split), open_store(config.store.path).spec.grid
        assert grid is not None
        folders = [self.root / "sweeps" / point["name"] / member["dir"] for member in point["members"]]
        found = [agreement(read_selection(folder / "selection.npz"), questions, grid) for folder in folders]
        known = [vars(one) for one in found if one is not None]
        return {name: round(float(np.mean([one[name] for one in known])), 2) for name in known[0]} if known else None

    def explained(self, point: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every score that ranks patches, as `train explain` measures it: percentages, mean over seeds."""
        found = []
        for member in point["members"]:
            folder = self.root / "sweeps" / point["name"] / member["dir"]
            explanation = read_explanation(folder)
            if explanation is None:
                explanation = explain(load_config(folder / "config.yaml"))
                explanation.write(folder)
            found.append({one.name: one for one in explanation.rankings})
        rows = []
        for name in found[0]:
            of_seeds = [rankings[name] for rankings in found]
            numbers = [{"deletion": one.deletion_area, "insertion": one.insertion_area} for one in of_seeds]
            for row, one in zip(numbers, of_seeds, strict=True):
                if one.agreement is not None and one.pointing is not None:
                    agreed = one.agreement
                    row |= {"pointing": one.pointing, "recall": agreed.asked, "others": agreed.others}
                    row["precision"] = agreed.precision
            means = {key: round(float(np.mean([row[key] for row in numbers])), 2) for key in numbers[0]}
            rows.append({"ranked_by": name, **means})
        return rows

    def size(self, label: str) -> dict[str, float]:
        """Megabytes of a copy's shards."""
        return {"mb": round(open_store(self.copy(label)).nbytes / 1e6, 1)}

    def training(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Over the seeds of a point: the accuracy of each, the percentage of answers of the wrong form, and the median
        of the steps until val reached 95% of its best.
        """
        folders = [self.root / "sweeps" / point["name"] / member["dir"] for member in point["members"]]
        tests = [json.loads((folder / "test.json").read_text()) for folder in folders]
        logs = [json.loads(line) for folder in folders for line in (folder / "log.jsonl").read_text().splitlines()]
        reached = [event for event in logs if event["event"] == "converged"]
        wrong = float(np.mean([100 * test["wrong_form"] / test["all"]["n"] for test in tests]))
        found: dict[str, Any] = {"of_seeds": [round(test["all"]["accuracy"], 2) for test in tests]}
        on_gpu = any(event["event"] == "cuda_graph" for event in logs)
        found["trained_on"] = "GPU" if on_gpu else "CPU"
        found["wrong_form"] = round(wrong, 2)
        if reached and reached[0]["steps"]:
            found["steps_to_95"] = float(np.median([event["steps"] for event in reached]))
        return found


@contextmanager
def grid_file(grid: Mapping[str, Sequence[Any]]) -> Iterator[Path]:
    """A file for `run_sweep`: values by option."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(grid), file)
        file.flush()
        yield Path(file.name)


def command(*words: str) -> None:
    subprocess.run([sys.executable, "-m", *words], check=True)


def rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4 if name == "p" else 2) for name, value in numbers.items()}


def slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text).strip("-")


def train_table(bench: Bench, splits: Sequence[str]) -> None:
    for split in splits:
        for label in bench.systems:
            system = SYSTEMS[label]
            bench.sweep(f"{split}-{slug(label)}", system.encoder, split, system.options, {})


def train_ratios(bench: Bench, splits: Sequence[str]) -> None:
    for split in splits:
        with grid_file({"head.scores": [list(scores) for scores in SOURCES]}) as grid:
            config = bench.config("lite", split, *SHORTER)
            run_sweep(config, ratios=RATIOS, seeds=bench.seeds, grid=grid, name=f"{split}-ratios")


def train_copies(bench: Bench, splits: Sequence[str]) -> None:
    for split in splits:
        for label in COPIES:
            bench.sweep(f"{split}-store-{slug(label)}", "lite", split, bench.copy_options(label), {})


def train_ablation(bench: Bench, splits: Sequence[str]) -> None:
    for split in splits:
        for label, setting in ABLATION.items():
            bench.sweep(f"{split}-part-{slug(label)}", "lite", split, [*PARAPHRASES, *SHORTER], setting)


def train_search(bench: Bench, splits: Sequence[str]) -> None:
    """The same grid for every head, one seed; the systems take what is best on val."""
    for split in splits:
        for label in [label for label in SEARCHED if label in bench.systems]:
            system = SYSTEMS[label]
            config = bench.config(system.encoder, split, *SHORTER, *system.options)
            run_sweep(config, seeds=bench.seeds[:1], grid=SEARCH, name=f"{split}-search-{slug(label)}")


def searched(bench: Bench, split: str, label: str) -> list[dict[str, Any]]:
    """What each point of a head's search scores on val, best first."""
    folder = bench.root / "sweeps" / f"{split}-search-{slug(label)}"
    options = [option.split(".") for option in yaml.safe_load(SEARCH.read_text())]
    rows = []
    for card in sorted(folder.glob("*/card.json")):
        read = json.loads(card.read_text())
        setting = {f"{part}.{name}": read["config"][part][name] for part, name in options}
        rows.append({"split": split, "system": label, "setting": setting, "val": round(read["val"]["all"], 2)})
    return sorted(rows, key=lambda row: -row["val"])


PARTS = {
    "search": train_search,
    "table": train_table,
    "ratios": train_ratios,
    "stores": train_copies,
    "ablation": train_ablation,
}


def gather(bench: Bench) -> dict[str, Any]:
    """Everything that is finished."""
    table, ablation, ratios, copies, looks, explained, wordings = [], [], [], [], [], [], []
    for split in SPLITS:
        whole = bench.found(f"{split}-{slug(REFERENCE)}")
        part_of = bench.found(f"{split}-part-{slug(WHOLE)}")
        if (shown := part_of or whole) and (found := bench.agreement(shown, split)):
            looks.append({"split": split, "scores": "question, saliency, prior", **found})
        if whole:
            explained += [{"split": split, **row} for row in bench.explained(whole)]
            wordings += [{"split": split, **row} for row in bench.disagreements(whole, split)]
        for label, system in SYSTEMS.items():
            if point := bench.found(f"{split}-{slug(label)}"):
                row = {"split": split, "system": label, "encoder": ENCODERS[system.encoder], **numbers(point)}
                row |= bench.training(point) | cost_of(bench.config(system.encoder, split, *system.options))
                if whole and label != REFERENCE:
                    row["psa_lite_above"] = bench.against(whole, point, split)
                table.append(row)
        for label, setting in ABLATION.items():
            if part_of and (point := bench.found(f"{split}-part-{slug(label)}")):
                row = {"split": split, "part": label, "setting": setting, **numbers(point), **bench.training(point)}
                if label != WHOLE:
                    row["against_whole"] = bench.against(point, part_of, split)
                ablation.append(row)
                if "head.scores" in setting and (found := bench.agreement(point, split)):
                    looks.append({"split": split, "scores": ", ".join(setting["head.scores"]), **found})
        path = bench.root / "sweeps" / f"{split}-ratios" / "sweep.json"
        if path.exists():
            points = json.loads(path.read_text())["points"]
            ratios += [
                {"split": split, "scores": point["setting"]["head.scores"], "ratio": point["ratio"], **numbers(point)}
                for point in points
            ]
        for label, copy in COPIES.items():
            if point := bench.found(f"{split}-store-{slug(label)}"):
                row = {"split": split, "store": label, **numbers(point), **bench.training(point), **bench.size(label)}
                row |= cost_of(bench.config("lite", split, *bench.copy_options(label)))
                if copy.against and (original := bench.found(f"{split}-store-{slug(copy.against)}")):
                    row["against"] = {"store": copy.against, **bench.against(point, original, split)}
                copies.append(row)
    search = [row for split in SPLITS for label in SEARCHED for row in searched(bench, split, label)]
    return {
        "table": table,
        "ablation": ablation,
        "ratios": ratios,
        "stores": copies,
        "search": search,
        "looks": looks,
        "explained": explained,
        "wordings": wordings,
    }


def numbers(point: Mapping[str, Any]) -> dict[str, Any]:
    return {"seeds": point["seeds"], **{part: rounded(point[part]) for part in NUMBERS if point[part]}}


def draw(bench: Bench, path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """The ratio curves with their bands, beside the level of the pooled head on the same features."""
    sweeps = [bench.root / "sweeps" / f"{split}-ratios" / "sweep.json" for split in SPLITS]
    level = {split: {} for split in SPLITS}  # type: dict[str, dict[str, float]]
    for row in table:
        if row["system"] in ("pooled (lite)", "question-only"):
            level[row["split"]][row["system"]] = row["all"]["mean"]
    curves = [read_sweep(sweep) for sweep in sweeps if sweep.exists()]
    if curves:
        plots.save(plots.draw_ratio(curves, level), path)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=["demo", "hard"], default="demo")
    parser.add_argument("--parts", choices=[*PARTS], nargs="*", default=["table"], help="to train; none: gather only")
    parser.add_argument("--splits", choices=SPLITS, nargs="+", default=list(SPLITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument(
        "--set-seed", type=int, default=0, help="renders another set of clips, whose results print only"
    )
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    parser.add_argument("--gpu", default=here, help="GPU that trained the runs; needed where another machine gathers")
    parser.add_argument("--systems", choices=list(SYSTEMS), nargs="+", default=list(SYSTEMS), help="rows to train")
    options = parser.parse_args(args)
    bench = Bench(options.set, options.clips, options.seeds, options.set_seed, options.systems)
    bench.encode(dict.fromkeys(SYSTEMS[label].encoder for label in bench.systems))
    for part in options.parts:
        PARTS[part](bench, options.splits)
    found = gather(bench)
    name = "egosynth" if options.set == "demo" else f"egosynth_{options.set}"
    result = {
        "what": f"EgoSynth, {options.set} set of {options.clips} clips; percent on test with 95% intervals over seeds "
        "and clips, checkpoint chosen on val",
        "command": shlex.join(["python", "benchmarks/egosynth.py", *(sys.argv[1:] if args is None else args)]),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "gpu": options.gpu},
        "versions": {package: version(package) for package in ("torch", "numpy", "av")},
        **found,
    }
    print(markdown(found))
    if options.set_seed:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(bench, RESULTS / f"{name}_ratios.png", found["table"])
    write_docs(options.set, found)


if __name__ == "__main__":
    main()
