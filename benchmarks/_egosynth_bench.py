"""EgoSynth's hard set, for `egosynth.py`: its folder, its configs, and the runs trained on it."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks._egosynth_systems import COPIES, PARAPHRASES, SHORTER, SYSTEMS
from benchmarks._egosynth_wordings import disagreements
from egopatch.configs.command_line import ConfigParser, load_config, parse_config
from egopatch.configs.schema import Config
from egopatch.extract.datasets import load_dataset
from egopatch.features import open_store
from egopatch.train.explanation.explain import explain
from egopatch.train.explanation.record import read_explanation
from egopatch.train.report.analysis import agreement
from egopatch.train.report.answers import load_questions
from egopatch.train.report.sources import read_selection
from egopatch.train.scores.metrics import read_predictions, same_lower_cased
from egopatch.train.scores.statistics import compare
from egopatch.train.sweeps.sweep import run_sweep


class Bench:
    """The set: its own folder below `folder`, its configs, to which `options` are added, and the runs trained on it."""

    name = "egosynth_hard"

    def __init__(
        self,
        clips: int,
        seeds: Sequence[int],
        set_seed: int = 0,
        systems: Collection[str] = (),
        folder: Path = Path("runs"),
        options: Sequence[str] = (),
    ) -> None:
        self.clips, self.seeds, self.set_seed, self.options = clips, list(seeds), set_seed, options
        self.root = folder / (self.name + (f"_{set_seed}" if set_seed else ""))
        self.systems = [label for label in SYSTEMS if label in systems or not systems]

    def file(self, encoder: str) -> Path:
        """The config of an encoder."""
        return Path("configs") / f"egosynth_hard_{encoder}.yaml"

    def config(self, encoder: str, split: str, *options: str) -> Config:
        """The config as the command line would read it, with all paths below the set's own folder."""
        given = [*self.places(encoder, split), *options, *self.options]
        return parse_config(ConfigParser(prog="egosynth"), ["--config", str(self.file(encoder)), *given])[0]

    def places(self, encoder: str, split: str) -> list[str]:
        weights = self.root / "weights"
        own = ["--data.root", self.root / "data", "--store.path", self.root / "stores" / encoder]
        own += ["--run.dir", self.root / split / encoder, "--run.table", self.root, "--data.split", split]
        if encoder != "lite":
            own += ["--encoder.checkpoint", weights / f"{encoder}-random.pth"]
            own += ["--text.model", weights / f"{encoder}-tokenizer"]
        return list(map(str, own))

    def encode(self, encoders: Collection[str]) -> None:
        """Render the set and make the stores of these encoders, unless they exist."""
        if not (self.root / "data" / "events.jsonl").exists():
            rendered = ["--hard", "--clips", str(self.clips), "--seed", str(self.set_seed)]
            command("extract", "synth", "--out", str(self.root / "data"), *rendered)
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
        """Path of the lite store, or of a copy, which is made if it does not exist."""
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
        """The point of a sweep of one setting, with the `folders` of its runs; None if it is not finished."""
        path = self.root / "sweeps" / name / "sweep.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        folders = [path.parent / member["dir"] for member in result["members"]]
        return {**result["points"][0], "folders": folders} if len(folders) == len(self.seeds) else None

    def against(self, ours: Mapping[str, Any], theirs: Mapping[str, Any], split: str) -> dict[str, Any]:
        """The paired difference of two points, in points of accuracy over all questions."""
        questions = load_dataset(self.config("lite", split).data).questions["test"]
        right = []
        for point in (ours, theirs):
            predictions = [read_predictions(folder / "predictions.jsonl", questions) for folder in point["folders"]]
            right.append([[same_lower_cased(q, answers[q.question_id]) for q in questions] for answers in predictions])
        result = compare(*right, [question.clip_id for question in questions])
        difference = result.difference
        found = {"difference": difference.mean, "low": difference.low, "high": difference.high, "p": result.p}
        return {**rounded(found), "verdict": result.verdict}

    def disagreements(self, point: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
        """Wordings of questions that the seeds of a point disagree about, or cannot answer."""
        questions = load_dataset(self.config("lite", split).data).questions
        files = [folder / "predictions.jsonl" for folder in point["folders"]]
        predictions = [read_predictions(file, questions["test"]) for file in files]
        return disagreements(questions["train"], questions["test"], predictions)

    def agreement(self, point: Mapping[str, Any], split: str) -> dict[str, float] | None:
        """How well the kept patches match the places of the objects asked about: percentages, mean over seeds."""
        config = self.config("lite", split)
        questions, grid = load_questions(config, split), open_store(config.store.path).spec.grid
        assert grid is not None
        files = [folder / "selection.npz" for folder in point["folders"]]
        found = [agreement(read_selection(file), questions, grid) for file in files]
        known = [vars(one) for one in found if one is not None]
        return {name: round(float(np.mean([one[name] for one in known])), 2) for name in known[0]} if known else None

    def explained(self, point: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every score that ranks patches, as `train explain` measures it: percentages, mean over seeds."""
        found = []
        for folder in point["folders"]:
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
        """Training of a point's seeds: the accuracy of each, the percentage of answers of the wrong form, and the
        median number of steps until val reached 95% of its best.
        """
        folders = point["folders"]
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
    """A grid file for `run_sweep`, with values by option."""
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
