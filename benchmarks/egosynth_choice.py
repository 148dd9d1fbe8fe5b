"""EgoSynth's multiple-choice set: psa beside the heads that see no video, and parts of it switched off.

    python benchmarks/egosynth_choice.py [--quick] [--out FILE]

The set is rendered and encoded once, then every system trains with every seed; what is finished is not done again.
Intervals and comparisons as in `egosynth.py`. Writes benchmarks/results/egosynth_choice.json and the set's part of
docs/egosynth.md.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._egosynth_bench import Bench, command, rounded, slug
from benchmarks._egosynth_docs import REFERENCE, compared, table, write_part
from benchmarks._egosynth_systems import ABLATION
from benchmarks._machine import RESULTS, add_result_arguments, stamp, write_result

CONFIG = Path("configs") / "egosynth_choice.yaml"
RESULT = "egosynth_choice.json"
BLIND = {
    "majority (the index that is right most often)": "majority",
    "longest-option": "longest-option",
    "question-only (question and options, no video)": "question-only",
}
# Components of psa to switch off, among those that the hard set's ablation does not find useful on both splits.
PARTS = (
    "question not at patches",
    "question not at the video",
    "without prior",
    "prior: flat at the start",
    "without saliency",
    "coarse gate not learned",
    "without coarse partition",
)
# Options and setting of each row.
SYSTEMS: dict[str, tuple[list[str], dict[str, Any]]] = {
    **{label: (["--head.name", head], {}) for label, head in BLIND.items()},
    REFERENCE: ([], {}),
    **{part: ([], ABLATION[part]) for part in PARTS},
}
ONLY = "all"  # the set has no other split


class ChoiceBench(Bench):
    """A bench with the set's only config and its own paths."""

    name = "egosynth_choice"

    def file(self, encoder: str) -> Path:
        return CONFIG

    def places(self, encoder: str, split: str) -> list[str]:
        places = {"data.root": "data", "store.path": "stores/lite", "run.dir": "psa", "run.table": ""}
        return [word for option, place in places.items() for word in (f"--{option}", str(self.root / place))]

    def encode(self, encoders: object = ()) -> None:
        if not (self.root / "data" / "events.jsonl").exists():
            command("extract", "synth", "--out", str(self.root / "data"), "--clips", str(self.clips))
        command("extract", "run", "--config", str(CONFIG), *self.places("lite", ONLY))


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=800)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_result_arguments(parser, RESULT, "few clips, one seed, one epoch, three systems")
    options = parser.parse_args(args)
    if options.quick:
        options.clips, options.seeds = 24, [0]
        systems = {label: SYSTEMS[label] for label in (*list(BLIND)[:1], REFERENCE, PARTS[0])}
        with tempfile.TemporaryDirectory() as folder:
            bench = ChoiceBench(options.clips, options.seeds, folder=Path(folder), options=("--train.epochs", "1"))
            rows = measure(bench, systems)
    else:
        rows = measure(ChoiceBench(options.clips, options.seeds), SYSTEMS)
    found = {
        "what": f"EgoSynth's multiple-choice set of {options.clips} clips; percent on test with 95% intervals over "
        "seeds and clips, checkpoint chosen on val",
        "command": "python benchmarks/egosynth_choice.py",
        "machine": stamp("av"),
        "systems": rows,
    }
    print(markdown(rows))
    if write_result(options, found) == RESULTS / RESULT:
        write_part("choice", markdown(rows))


def measure(bench: ChoiceBench, systems: Mapping[str, tuple[list[str], dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each of `systems`; trains those that are not finished."""
    bench.encode()
    for label, (own, setting) in systems.items():
        bench.sweep(slug(label), "lite", ONLY, own, setting)
    points = {label: bench.found(slug(label)) for label in systems}
    rows = []
    for label, point in points.items():
        assert point
        row = {"system": label, "all": rounded(point["all"]), **bench.training(point)}
        rows.append(row if label == REFERENCE else row | {"against_psa": bench.against(point, points[REFERENCE], ONLY)})
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The set's table in docs/egosynth.md."""
    columns = ("all", "each seed", "against psa (lite)", "verdict")
    lines = table("system", columns, [[row["system"], *compared(row, "against_psa")] for row in rows], texts=1)
    return "\n".join(lines).strip()


if __name__ == "__main__":
    main()
