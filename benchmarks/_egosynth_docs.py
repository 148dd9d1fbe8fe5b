"""The tables of docs/egosynth.md, and its sentences about differences, from the results of `egosynth.py`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs" / "egosynth.md"
SPLITS = ("direct", "indirect")
NUMBERS = ("open", "binary", "all")
REFERENCE = "psa (lite)"
SYSTEM_COLUMNS = (
    "open", "binary", "all", "all, each seed", "psa (lite) is above by", "wrong form", "steps to 95%", "CPU ms a step",
    "kB a clip",
)  # fmt: skip
STORE_COLUMNS = (
    "MB", "kB a clip", "CPU ms a step", "all", "each seed", "against float16, same levels", "verdict",
)  # fmt: skip
EXPLAINED = ("deletion", "insertion", "pointing", "recall", "others", "precision")
EXPLAINED_CAPTION = (
    "By `train explain` ([training.md](training.md#what-the-answers-depend-on)): areas below the deletion and insertion"
    " curves (a good ranking has a small deletion area and a large insertion area), and the patches with the highest"
    " scores against the known places of the objects asked about. Percent, mean over seeds. Attention is not an"
    " explanation: only the curves say what the answers depend on."
)


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
    """Sentences about differences that the intervals show; docs/egosynth.md says nothing else about differences."""
    lines = []
    for split in SPLITS:
        rows = [row for row in found["table"] if row["split"] == split]
        verdicts = {row["system"]: row["psa_lite_above"]["verdict"] for row in rows if "psa_lite_above" in row}
        if verdicts:
            lines.append(f"- **{split.capitalize()}, systems.** " + sentence(REFERENCE, verdicts))
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
    verbs = {"above": "is above", "below": "is below", "cannot be told apart": "cannot be told apart from"}
    clauses = []
    for verdict, verb in verbs.items():
        names = [name for name, found in verdicts.items() if found == verdict]
        if names:
            clauses.append(f"{'it' if clauses else subject} {verb} {listed(names)}")
    return "; ".join(clauses) + "."


def listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def markers(name: str) -> tuple[str, str]:
    """The first and the last line of a set's part of docs/egosynth.md."""
    return f"<!-- results of the {name} set, by its script in benchmarks/ -->", f"<!-- end of the {name} set -->"


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


def table(head: str, columns: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 0) -> list[str]:
    """Lines of a table, none without rows.

    Args:
        head: Head of the first column, which holds text.
        columns: Heads of the other columns, which hold numbers, except for the last `texts`.
        rows: Cells of each row.
        texts: Number of columns at the end that hold text.
    """
    if not rows:
        return []
    align = ":--|" + "--:|" * (len(columns) - texts) + ":--|" * texts
    return [
        "",
        f"| {' | '.join([head, *columns])} |",
        f"|{align}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]


def system_cells(row: Mapping[str, Any]) -> list[str]:
    """Cells of a system in the first table; heads that learn nothing have no costs."""
    costs = [f"{row[name]:.0f}" if name in row else "" for name in ("steps_to_95", "cpu_ms_a_step", "kb_a_clip")]
    accuracies = [*(interval(row[part]) for part in NUMBERS), seeds_of(row), gap_of(row.get("psa_lite_above"))]
    return [row["system"], *accuracies, f"{row['wrong_form']:.1f}%", *costs]


def store_cells(row: Mapping[str, Any]) -> list[str]:
    """Cells of a copy of the store: its costs, and a head's accuracy on it."""
    costs = [f"{row['mb']:.1f}", f"{row['kb_a_clip']:.0f}", f"{row['cpu_ms_a_step']:.0f}"]
    return [row["store"], *costs, *compared(row, "against")]


def percents(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{row[name]:.1f}" for name in names]


Rows = Sequence[Mapping[str, Any]]


def system_table(split: str, rows: Rows) -> list[str]:
    return table(f"{split}: system", SYSTEM_COLUMNS, list(map(system_cells, rows)))


def component_table(split: str, rows: Rows) -> list[str]:
    columns = ("all", "each seed", "against the whole", "verdict")
    cells = [[row["part"], *compared(row, "against_whole")] for row in rows]
    return table(f"{split}: {REFERENCE}", columns, cells, texts=1)


def ratio_table(split: str, rows: Rows) -> list[str]:
    curves: dict[str, list[str]] = {}
    for row in rows:
        curves.setdefault(", ".join(row["scores"]), []).append(interval(row["all"]))
    ratios = [f"{ratio:g}" for ratio in dict.fromkeys(row["ratio"] for row in rows)]
    return table(f"{split}: kept by, share of patches", ratios, [[name, *curve] for name, curve in curves.items()])


def store_table(split: str, rows: Rows) -> list[str]:
    return table(f"{split}: store", STORE_COLUMNS, list(map(store_cells, rows)), texts=2)


def look_table(split: str, rows: Rows) -> list[str]:
    columns = ("asked about", "other objects", "at random", "precision")
    cells = [[row["scores"], *percents(row, ("asked", "others", "chance", "precision"))] for row in rows]
    return table(f"{split}: selected by", columns, cells)


def explained_table(split: str, rows: Rows) -> list[str]:
    cells = [[row["ranked_by"], *percents(row, EXPLAINED)] for row in rows]
    return table(f"{split}: {REFERENCE}, patches ranked by", EXPLAINED, cells)


def wording_table(split: str, rows: Rows) -> list[str]:
    columns = ("training questions", "test questions", "right, each seed")
    cells = [[row["wording"], row["train"], row["test"], seeds_of(row)] for row in rows]
    return table(f"{split}: {REFERENCE}, by wording", columns, cells if len(cells) > 1 else [])


def search_table(split: str, rows: Rows) -> list[str]:
    cells = [[row["system"], *row["setting"].values(), f"{row['val']:.1f}"] for row in rows]
    return table(f"{split}: searched", [*rows[0]["setting"], "val"], cells)


# Heading, text, kind of the results' rows, and what writes those of a split.
SECTIONS: Sequence[tuple[str, str, str, Callable[[str, Rows], list[str]]]] = (
    ("Systems", "", "table", system_table),
    ("Components", "", "ablation", component_table),
    ("Ratios", "", "ratios", ratio_table),
    ("Copies of the store", "", "stores", store_table),
    ("What heads select", "", "looks", look_table),
    ("What answers depend on", EXPLAINED_CAPTION, "explained", explained_table),
    ("Wordings", "", "wordings", wording_table),
    ("Search", "", "search", search_table),
)


def markdown(found: Mapping[str, Any]) -> str:
    """The findings and tables of docs/egosynth.md."""
    lines = findings(found)
    for heading, text, kind, write in SECTIONS:
        tables = []
        for split in SPLITS:
            if rows := [row for row in found.get(kind, ()) if row["split"] == split]:
                tables += write(split, rows)
        if tables:
            lines += ["", f"### {heading}", *(["", text] if text else []), *tables]
    return "\n".join(lines).strip()
