"""What a sweep found: its members, its points over seeds and questions, and each point against the first.

`sweep.json` holds all of it, `sweep.csv` a line a point, `sweep.png` the picture.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Question, load_dataset
from egopatch.train.rundir import card as folder
from egopatch.train.scores.metrics import read_predictions, same_lower_cased
from egopatch.train.scores.statistics import Matrix, bootstrap, compare

PARTS = ("open", "binary", "all")
SEED = "train.seed"
Done = tuple[Mapping[str, Any], Config]


def write_results(facts: Mapping[str, Any], done: Sequence[Done], config: Config, out: Path) -> Path:
    """Write the three files into `out`; returns the path of `sweep.json`.

    Args:
        facts: of the sweep, as they go into the JSON.
        done: overrides and config of the members that are finished.
        config: what they share.
        out: folder of the sweep.
    """
    questions = load_dataset(config.data).questions["test"]
    points = gather_points(done, questions)
    result = {
        **facts,
        "members": [_record(overrides, member, out) for overrides, member in done],
        "points": [summary for summary, _ in points],
        "comparisons": compare_points(points, questions),
    }
    folder.write_whole(out / "sweep.json", json.dumps(result, indent=2) + "\n")
    folder.write_whole(out / "sweep.csv", as_csv(result["points"]))
    if points:
        _draw(out)
    for line in describe(result):
        print(line, flush=True)
    return out / "sweep.json"


def gather_points(done: Sequence[Done], questions: Sequence[Question]) -> list[tuple[dict[str, Any], Matrix]]:
    """Each setting with its seeds: what `sweep.json` says of it, and right or wrong [seeds, questions]."""
    settings: dict[str, list[Done]] = {}
    for overrides, member in done:
        setting = {option: value for option, value in overrides.items() if option != SEED}
        settings.setdefault(json.dumps(setting, default=str), []).append((overrides, member))
    forms = np.array([question.form for question in questions])
    clips = np.array([question.clip_id for question in questions])
    points = []
    for members in settings.values():
        members = sorted(members, key=lambda one: one[1].train.seed)
        right = np.array([_right(member, questions) for _, member in members])
        summary: dict[str, Any] = {
            "setting": {option: value for option, value in members[0][0].items() if option != SEED},
            "ratio": members[0][1].head.ratio,
            "seeds": [member.train.seed for _, member in members],
        }
        for part in PARTS:
            chosen = np.ones(len(forms), dtype=bool) if part == "all" else forms == part
            summary[part] = None
            if chosen.any():
                found = bootstrap(100 * right[:, chosen], clips[chosen].tolist())
                summary[part] = {"mean": found.mean, "low": found.low, "high": found.high, "n": int(chosen.sum())}
        points.append((summary, right))
    return points


def compare_points(points: Sequence[tuple[dict[str, Any], Matrix]], questions: Sequence[Question]) -> list[Any]:
    """Every later point against the first, in points of accuracy over all questions, where both have the same seeds."""
    clips = [question.clip_id for question in questions]
    found = []
    for summary, right in points[1:]:
        first, base = points[0]
        if summary["seeds"] != first["seeds"]:
            continue
        result = compare(100 * right, 100 * base, clips)
        difference = result.difference
        found.append(
            {
                "setting": summary["setting"],
                "against": first["setting"],
                "difference": difference.mean,
                "low": difference.low,
                "high": difference.high,
                "p": result.p,
            }
        )
    return found


def as_csv(points: Sequence[Mapping[str, Any]]) -> str:
    """A line a point."""
    options = list(dict.fromkeys(option for point in points for option in point["setting"]))
    numbers = [f"{part}_{what}" for part in PARTS for what in ("mean", "low", "high", "n")]
    content = io.StringIO()
    writer = csv.DictWriter(content, [*options, "seeds", *numbers], lineterminator="\n")
    writer.writeheader()
    for point in points:
        line = {option: _plain(point["setting"].get(option)) for option in options}
        line["seeds"] = str(len(point["seeds"]))
        for part in PARTS:
            for what, value in (point[part] or {}).items():
                line[f"{part}_{what}"] = f"{value:.4f}" if isinstance(value, float) else str(value)
        writer.writerow(line)
    return content.getvalue()


def describe(result: Mapping[str, Any]) -> list[str]:
    """A line a point, then a line a comparison."""
    lines = []
    for point in result["points"]:
        parts = [
            f"{part} {point[part]['mean']:.2f} [{point[part]['low']:.2f}, {point[part]['high']:.2f}]"
            for part in PARTS
            if point[part]
        ]
        lines.append(f"  {_name(point['setting'])}: {', '.join(parts)}, {len(point['seeds'])} seeds")
    return lines + [
        f"  {_name(pair['setting'])} against {_name(pair['against'])}: {pair['difference']:+.2f} "
        f"[{pair['low']:+.2f}, {pair['high']:+.2f}], p {pair['p']:.4f}"
        for pair in result["comparisons"]
    ]


def _right(member: Config, questions: Sequence[Question]) -> list[bool]:
    answers = read_predictions(member.run.dir / folder.PREDICTIONS, questions)
    return [same_lower_cased(question, answers[question.question_id]) for question in questions]


def _record(overrides: Mapping[str, Any], member: Config, out: Path) -> dict[str, Any]:
    test = json.loads((member.run.dir / folder.TEST).read_text(encoding="utf-8"))
    return {
        "ratio": member.head.ratio,
        "seed": member.train.seed,
        "overrides": dict(overrides),
        **{part: test[part]["accuracy"] for part in PARTS},
        "n": test["all"]["n"],
        "dir": member.run.dir.relative_to(out).as_posix(),
    }


def _draw(out: Path) -> None:
    # Matplotlib takes a second to import, which training has no use for.
    from egopatch.train.report import plots
    from egopatch.train.report.sources import read_sweep

    sweep = read_sweep(out / "sweep.json")
    plots.save(plots.draw_ratio([sweep], {}) if sweep.varies_ratio else plots.draw_settings(sweep), out / "sweep.png")


def _name(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{option} {_plain(value)}" for option, value in setting.items()) or "the config"


def _plain(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
