"""EgoSynth's hard set: every system with its interval, psa without each part, accuracy against the selection ratio.

    python benchmarks/egosynth.py                                    the table of systems
    python benchmarks/egosynth.py --parts search table ratios stores ablation

The set is rendered and encoded once, then every system trains with every seed, by the commands and configs that a user
has. What is finished is not done again, so the same command resumes after any interruption. Intervals are over
seeds and clips, comparisons are paired by question (train/scores/statistics.py). Checkpoints are chosen on
val; nothing is chosen on test. Writes benchmarks/results/egosynth_hard.json, for the ratios a picture in
docs/pictures/, and the tables and findings of docs/egosynth.md between its markers.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._egosynth_bench import Bench, grid_file, rounded, slug
from benchmarks._egosynth_cost import cost_of
from benchmarks._egosynth_docs import NUMBERS, REFERENCE, SPLITS, markdown, write_part
from benchmarks._egosynth_systems import (
    ABLATION,
    CONTRAST,
    COPIES,
    ENCODERS,
    PARAPHRASES,
    SEARCHED,
    SHORTER,
    SOURCES,
    SYSTEMS,
    WHOLE,
)
from benchmarks._machine import RESULTS, add_result_arguments, stamp, write_result
from egopatch.train.report import plots
from egopatch.train.report.sources import read_sweep
from egopatch.train.sweeps.sweep import run_sweep

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
RATIOS = (0.1, 0.25, 0.5, 1.0)
SEARCH = Path(__file__).parent / "egosynth_search.yaml"


def train_table(bench: Bench, split: str) -> None:
    for label in bench.systems:
        system = SYSTEMS[label]
        bench.sweep(f"{split}-{slug(label)}", system.encoder, split, system.options, {})


def train_ratios(bench: Bench, split: str) -> None:
    with grid_file({"head.scores": [list(scores) for scores in SOURCES]}) as grid:
        config = bench.config("lite", split, *SHORTER)
        run_sweep(config, ratios=RATIOS, seeds=bench.seeds, grid=grid, name=f"{split}-ratios")


def train_copies(bench: Bench, split: str) -> None:
    for label in COPIES:
        bench.sweep(f"{split}-store-{slug(label)}", "lite", split, bench.copy_options(label), {})


def train_ablation(bench: Bench, split: str) -> None:
    for label, setting in ABLATION.items():
        options = PARAPHRASES if label == CONTRAST else ()
        bench.sweep(f"{split}-part-{slug(label)}", "lite", split, options, setting)


def train_search(bench: Bench, split: str) -> None:
    """The same grid for every head, one seed; the systems use the setting that is best on val."""
    for label in SEARCHED:
        if label in bench.systems:
            system = SYSTEMS[label]
            config = bench.config(system.encoder, split, *SHORTER, *system.options)
            run_sweep(config, seeds=bench.seeds[:1], grid=SEARCH, name=f"{split}-search-{slug(label)}")


def searched(bench: Bench, split: str, label: str) -> list[dict[str, Any]]:
    """The val score of each point of a head's search, best first."""
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
    """Results of everything that is finished."""
    table, ablation, ratios, copies, looks, explained, wordings = [], [], [], [], [], [], []
    for split in SPLITS:
        whole = bench.found(f"{split}-{slug(REFERENCE)}")
        if whole:
            if found := bench.agreement(whole, split):
                looks.append({"split": split, "scores": "question, saliency, prior", **found})
            ablation.append({"split": split, "part": WHOLE, "setting": {}, **numbers(whole), **bench.training(whole)})
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
            if whole and (point := bench.found(f"{split}-part-{slug(label)}")):
                row = {"split": split, "part": label, "setting": setting, **numbers(point), **bench.training(point)}
                ablation.append(row | {"against_whole": bench.against(point, whole, split)})
                if "head.scores" in setting and (found := bench.agreement(point, split)):
                    looks.append({"split": split, "scores": ", ".join(setting["head.scores"]), **found})
        path = bench.root / "sweeps" / f"{split}-ratios" / "sweep.json"
        for point in json.loads(path.read_text())["points"] if path.exists() else ():
            found = {"scores": point["setting"]["head.scores"], "ratio": point["ratio"]}
            ratios.append({"split": split, **found, **numbers(point)})
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
    """Draw the ratio curves with their bands, and the levels of the pooled and the question-only head."""
    sweeps = [bench.root / "sweeps" / f"{split}-ratios" / "sweep.json" for split in SPLITS]
    level: dict[str, dict[str, float]] = {split: {} for split in SPLITS}
    for row in table:
        if row["system"] in ("pooled (lite)", "question-only"):
            level[row["split"]][row["system"]] = row["all"]["mean"]
    curves = [read_sweep(sweep) for sweep in sweeps if sweep.exists()]
    if curves:
        plots.save(plots.draw_ratio(curves, level), path)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    add_result_arguments(parser, "egosynth_hard.json", "few clips, one seed, one epoch, three systems and the ratios")
    options = parser.parse_args(args)
    if options.set_seed:
        options.result = None
    if options.quick:
        options.clips, options.seeds, options.splits, options.parts = 24, [0], ["direct"], ["table", "ratios"]
        options.systems = ["majority", "question-only", REFERENCE]
    with tempfile.TemporaryDirectory() as folder:
        place: dict[str, Any] = {"folder": Path(folder), "options": ("--train.epochs", "1")} if options.quick else {}
        bench = Bench(options.clips, options.seeds, options.set_seed, options.systems, **place)
        bench.encode(dict.fromkeys(SYSTEMS[label].encoder for label in bench.systems))
        for part in options.parts:
            for split in options.splits:
                PARTS[part](bench, split)
        found = gather(bench)
    result = {
        "what": f"EgoSynth, hard set of {options.clips} clips; percent on test with 95% intervals over seeds "
        "and clips, checkpoint chosen on val",
        "command": shlex.join(["python", "benchmarks/egosynth.py", *(sys.argv[1:] if args is None else args)]),
        "machine": stamp("av") | {"gpu": options.gpu},
        **found,
    }
    print(markdown(found))
    out = write_result(options, result)
    if out is not None and options.result is not None and out == RESULTS / options.result:
        draw(bench, PICTURES / f"{out.stem}_ratios.png", found["table"])
        write_part("hard", markdown(found))


if __name__ == "__main__":
    main()
