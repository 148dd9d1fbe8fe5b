"""The tables of docs/egosynth.md, and its sentences about differences, from the results of `egosynth.py`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "egosynth.md"
SPLITS = ("direct", "indirect")
NUMBERS = ("open", "binary", "all")
REFERENCE = "psa (lite)"
COMPARED = ("all", "each seed", "against float16, same levels", "verdict")
EXPLAINED = ("deletion", "insertion", "pointing", "recall", "others", "precision")
EXPLAINED_CAPTION = (
    "By `train explain` ([training.md](training.md#what-the-answers-depend-on)): areas below the deletion and insertion"
    " curves, which are small and large where a ranking says what matters, and the patches with the highest scores "
    "against the known places of the objects asked about. Percent, mean over seeds. Attention is not an explanation: "
    "only the curves say what the answers depend on."
)
# What stands in a set's part until there are results.
NOT_MEASURED = "Not measured yet."


def interval(number: Mapping[str, float]) -> str:
    return f"{number['mean']:.1f} [{number['low']:.1f}, {number['high']:.1f}]"


def seeds_of(row: Mapping[str, Any]) -> str:
    """The accuracy of each seed."""
    return ", ".join(f"{accuracy:.1f}" for accuracy in row["of_seeds"])


def gap_of(gap: Mapping[str, float] | None) -> str:
    """A paired difference with its interval; empty for the row that others are compared with."""
    return "" if gap is None else f"{gap['difference']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]"


def compared(row: Mapping[str, Any], against: str) -> list[str]:
    """Four cells: accuracy, each seed's, the difference in `row[against]` and its verdict."""
    gap = row.get(against)
    return [interval(row["all"]), seeds_of(row), gap_of(gap), "" if gap is None else gap["verdict"]]


def findings(found: Mapping[str, Any]) -> list[str]:
    """What the intervals say, in sentences; nothing else about differences is said in docs/egosynth.md."""
    lines = []
    for split in SPLITS:
        rows = [row for row in found["table"] if row["split"] == split]
        compared = {row["system"]: row["psa_lite_above"]["verdict"] for row in rows if "psa_lite_above" in row}
        if compared:
            lines.append(f"- **{split.capitalize()}, systems.** " + sentence(REFERENCE, compared))
        majority = next((row for row in rows if row["system"] == "majority"), None)
        for row in rows if majority else ():
            below = [part for part in NUMBERS if row[part]["high"] < majority[part]["mean"]]
            if below:
                lines.append(f"- **{split.capitalize()}.** {row['system']} is below majority on {listed(below)}.")
        changed = [row for row in found["ablation"] if row["split"] == split and "against_whole" in row]
        if changed:
            opposite = {"above": "below", "below": "above"}
            verdicts = {row["part"]: row["against_whole"]["verdict"] for row in changed}
            whole = {part: opposite.get(verdict, verdict) for part, verdict in verdicts.items()}
            lines.append(f"- **{split.capitalize()}, components.** " + sentence("The whole", whole))
    return lines


def sentence(subject: str, verdicts: Mapping[str, str]) -> str:
    """`SUBJECT is above A and B; it cannot be told apart from C.`"""
    said = {"above": "is above", "below": "is below", "cannot be told apart": "cannot be told apart from"}
    clauses = []
    for verdict, verb in said.items():
        names = [name for name, found in verdicts.items() if found == verdict]
        if names:
            clauses.append(f"{'it' if clauses else subject} {verb} {listed(names)}")
    return "; ".join(clauses) + "."


def listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def markers(name: str) -> tuple[str, str]:
    """The first and the last line of a set's part of docs/egosynth.md."""
    return f"<!-- results of the {name} set, by its script in benchmarks/ -->", f"<!-- end of the {name} set -->"


def write_docs(name: str, found: Mapping[str, Any], path: Path = DOCS) -> None:
    """Replace the tables and findings of a set in the docs; raises as `write_part`."""
    write_part(name, markdown(found), path)


def write_part(name: str, content: str, path: Path = DOCS) -> None:
    """Replace a set's part of the docs.

    Raises:
        ValueError: The docs have no part of this set.
    """
    text, (first, last) = path.read_text(encoding="utf-8"), markers(name)
    if first not in text or last not in text:
        raise ValueError(f"{path} has no part of the {name} set; expected the lines {first!r} and {last!r}")
    before, rest = text.split(first)
    path.write_text(f"{before}{first}\n{content}\n{last}{rest.split(last)[1]}", encoding="utf-8")


def markdown(found: Mapping[str, Any]) -> str:
    """The tables and findings of docs/egosynth.md."""
    lines = []
    for split in SPLITS:
        rows = [row for row in found["table"] if row["split"] == split]
        if rows:
            lines += [
                "",
                f"| {split}: system | open | binary | all | all, each seed | psa (lite) is above by | wrong form | "
                "steps to 95% | CPU ms a step | kB a clip |",
                "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
            ]
        for row in rows:
            cells = [*(interval(row[part]) for part in NUMBERS), seeds_of(row), gap_of(row.get("psa_lite_above"))]
            cells.append(f"{row['wrong_form']:.1f}%")
            learned = "steps_to_95" in row
            costs = ("steps_to_95", "cpu_ms_a_step", "kb_a_clip")
            cells += [f"{row[name]:.0f}" if learned else "" for name in costs]
            lines.append(f"| {row['system']} | {' | '.join(cells)} |")
    for split in SPLITS:
        rows = [row for row in found["ablation"] if row["split"] == split]
        if rows:
            lines += ["", f"| {split}: psa (lite) | all | each seed | against the whole | verdict |"]
            lines += ["|:--|--:|--:|--:|:--|"]
        for row in rows:
            lines.append(f"| {row['part']} | {' | '.join(compared(row, 'against_whole'))} |")
    for split in SPLITS:
        rows = [row for row in found["ratios"] if row["split"] == split]
        if rows:
            ratios = list(dict.fromkeys(row["ratio"] for row in rows))
            lines += [
                "",
                f"| {split}: kept by, share of patches | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
            ]
            lines += ["|:--|" + "--:|" * len(ratios)]
            for scores in dict.fromkeys(tuple(row["scores"]) for row in rows):
                cells = [interval(row["all"]) for row in rows if tuple(row["scores"]) == scores]
                lines.append(f"| {', '.join(scores)} | {' | '.join(cells)} |")
    for split in SPLITS:
        # Results of earlier versions have none.
        rows = [row for row in found.get("stores", ()) if row["split"] == split]
        if rows:
            lines += ["", f"| {split}: store | MB | kB a clip | CPU ms a step | {' | '.join(COMPARED)} |"]
            lines += ["|:--|--:|--:|--:|--:|--:|:--|:--|"]
        for row in rows:
            costs = [f"{row['mb']:.1f}", f"{row['kb_a_clip']:.0f}", f"{row['cpu_ms_a_step']:.0f}"]
            lines.append(f"| {row['store']} | {' | '.join([*costs, *compared(row, 'against')])} |")
    for split in SPLITS:
        rows = [row for row in found["looks"] if row["split"] == split]
        if rows:
            lines += ["", f"| {split}: selected by | asked about | other objects | at random | precision |"]
            lines += ["|:--|--:|--:|--:|--:|"]
        for row in rows:
            percents = [f"{row[name]:.1f}" for name in ("asked", "others", "chance", "precision")]
            lines.append(f"| {row['scores']} | {' | '.join(percents)} |")
    for split in SPLITS:
        # Results of earlier versions have none.
        rows = [row for row in found.get("explained", ()) if row["split"] == split]
        if rows:
            lines += ["", f"| {split}: psa (lite), patches ranked by | {' | '.join(EXPLAINED)} |"]
            lines += ["|:--|" + "--:|" * len(EXPLAINED)]
        for row in rows:
            lines.append(f"| {row['ranked_by']} | {' | '.join(f'{row[name]:.1f}' for name in EXPLAINED)} |")
    if found.get("explained"):
        lines += ["", EXPLAINED_CAPTION]
    for split in SPLITS:
        rows = [row for row in found.get("wordings", ()) if row["split"] == split]
        if len(rows) > 1:
            lines += [
                "",
                f"| {split}: psa (lite), by wording | training questions | test questions | right, each seed |",
            ]
            lines += ["|:--|--:|--:|--:|"]
            for row in rows:
                seeds = ", ".join(f"{share:.1f}" for share in row["of_seeds"])
                lines.append(f"| {row['wording']} | {row['train']} | {row['test']} | {seeds} |")
    for split in SPLITS:
        rows = [row for row in found["search"] if row["split"] == split]
        if rows:
            options = list(rows[0]["setting"])
            lines += ["", f"| {split}: searched | " + " | ".join([*options, "val"]) + " |"]
            lines += ["|:--|" + "--:|" * (len(options) + 1)]
        for row in rows:
            lines.append(f"| {row['system']} | {' | '.join(map(str, row['setting'].values()))} | {row['val']:.1f} |")
    return "\n".join([*lines, "", *findings(found)]).strip()
