"""The results table: `table.md` and `table.json`, in the published shape, with where the numbers come from."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from egopatch.train.rundir.results import COLUMNS, Results, Row, gather


def write_table(folder: Path) -> list[dict[str, Any]]:
    """Write `table.md` and `table.json` into `folder` from the runs below it.

    Incomplete and damaged runs are listed under the table and on stderr, one line each.

    Returns:
        The rows as in `table.json`: `model`, `split`, `open`, `binary`, `all` (percent, two decimals, None without
        such questions), `n` (test questions), `checkpoint`, `log` (paths relative to `folder`, None without the file).

    Raises:
        TableError: there is no readable run.
    """
    results = gather(folder)
    records = [record(row, folder) for row in results.rows]
    (folder / "table.json").write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(results), encoding="utf-8")
    for problem in results.problems:
        print(f"table: {problem}", file=sys.stderr)
    return records


def record(row: Row, folder: Path) -> dict[str, Any]:
    """One entry of `table.json`."""
    numbers = {part: None if (mean := row.mean(part)) is None else round(mean, 2) for part in COLUMNS}
    return {
        "model": row.label,
        "split": row.split,
        **numbers,
        "n": row.n("all"),
        "checkpoint": _relative(row.best.checkpoint, folder),
        "log": _relative(row.best.log, folder),
    }


def markdown(results: Results) -> str:
    """`table.md`: a section for each split, then where the numbers come from and what they are not."""
    lines = ["# Results", "", "Accuracy on the test questions, in percent.", ""]
    for split in results.splits:
        rows = results.split(split)
        lines += [f"## {split.capitalize()}", "", question_counts(rows), ""]
        lines += ["| Model | Open | Binary | All | Checkpoint | Log |", "|:--|--:|--:|--:|:--|:--|"]
        for row in rows:
            cells = [cell(row, part) for part in COLUMNS]
            links = [
                f"[{path.name}](<{_relative(path, results.folder)}>)" if path else "–"
                for path in (row.best.checkpoint, row.best.log)
            ]
            lines.append("| " + " | ".join([_escape(row.label), *cells, *links]) + " |")
        tagged = [f"{_escape(row.label)} {cell(row, 'split_tag')}" for row in rows if row.mean("split_tag") is not None]
        if tagged:
            n = rows[0].n("split_tag")
            lines += ["", f"All over the {n:,} questions tagged `{split}` alone: {', '.join(tagged)}."]
        lines.append("")
    lines += ["## Where these numbers come from", ""]
    lines += [f"- {line}" for line in (*notices(results), *origin(results))]
    lines += [f"- Left out or worth a look: {_escape(problem)}" for problem in results.problems]
    return "\n".join(lines) + "\n"


def cell(row: Row, part: str) -> str:
    """A number of the table: the mean with two decimals, and the spread where there are several seeds."""
    mean, sd = row.mean(part), row.sd(part)
    if mean is None:
        return "–"
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


def question_counts(rows: Sequence[Row]) -> str:
    """How many questions the numbers of one split are over; says so where the rows disagree."""
    counts = {tuple(row.n(part) for part in ("all", "open", "binary")): row.label for row in rows}
    texts = [f"n = {a:,} questions: {o:,} open, {b:,} binary" for a, o, b in counts]
    if len(texts) == 1:
        return texts[0] + "."
    return "Rows are over different questions: " + "; ".join(
        f"{model} {text}" for model, text in zip(counts.values(), texts)
    )


def notices(results: Results) -> list[str]:
    """What must be said beside the numbers: random stand-in weights, a synthetic set. Taken from the model cards."""
    cards = [run.card for row in results.rows for run in row.runs]
    found = []
    random = dict.fromkeys(r.label for r in results.rows if r.system != "majority" and is_standin(r.best.card))
    if random:
        found.append(
            f"The encoder's weights are random stand-ins, not the published ones, in {', '.join(random)}: "
            "these numbers show that the pipeline works, not how good the published network is."
        )
    lite = dict.fromkeys(r.label for r in results.rows if _option(r.best.card, "encoder", "arch") == "lite")
    if lite:
        names = ", ".join(lite)
        found.append(f"Real pretrained weights (ImageNet, MiniLM), not trained on this set, encode for {names}.")
    if any(is_synthetic(card) for card in cards):
        found.append("The videos and questions are synthetic (EgoSynth): not comparable with EgoTaskQA results.")
    return found


def is_standin(card: Mapping[str, Any]) -> bool:
    """Whether a card says that the encoder's weights are random."""
    checkpoint = Path(str(_option(card, "encoder", "checkpoint"))).name.lower()
    return _stated(card, "stand-in", "standin", "random weight", "random-weight") or "random" in checkpoint


def is_synthetic(card: Mapping[str, Any]) -> bool:
    """Whether a card says that the data were rendered."""
    root = str(_option(card, "data", "root"))
    # The renderer leaves its event log beside the annotations; no recorded data set has one.
    return _stated(card, "synthetic", "egosynth") or (bool(root) and (Path(root) / "events.jsonl").exists())


def origin(results: Results) -> list[str]:
    """How the numbers were made, one statement an item."""
    seeds = sorted({len(row.runs) for row in results.rows})
    spread = "one seed a row" if seeds == [1] else f"mean ± standard deviation over {_span(seeds)} seeds a row"
    unseen = max(run.quarantined for row in results.rows for run in row.runs)
    quarantined = f"Up to {unseen:,} test questions are about quarantined clips; they got the majority answer, unseen."
    return [
        f"{spread[0].upper()}{spread[1:]}; checkpoint and log are those of the seed best on val; "
        "nothing is chosen on test.",
        "Each row is the mean of `test.json` in the run folders; the run's `card.json` has its command and versions.",
        "`majority` and `question-only` never see the video. The other systems read the same cached features "
        "of uniformly sampled frames.",
        *([quarantined] if unseen else []),
    ]


def _span(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _option(card: Mapping[str, Any], section: str, name: str) -> object:
    return ((card.get("config") or {}).get(section) or {}).get(name, "")


def _stated(card: Mapping[str, Any], *words: str) -> bool:
    """Whether the card's notice, fingerprints or data and encoder options have one of `words`."""
    config = card.get("config") or {}
    places = [card.get(key) for key in ("notice", "notices", "fingerprint", "text_fingerprint")]
    places += [config.get(section) for section in ("data", "encoder")]
    text = " ".join(json.dumps(place, default=str).lower() for place in places if place)
    return any(word in text for word in words)


def _relative(path: Path | None, folder: Path) -> str | None:
    return None if path is None else path.relative_to(folder).as_posix()


def _escape(text: str) -> str:
    """Keep text from ending a table cell or starting markup."""
    return text.replace("|", "\\|").replace("<", "&lt;")
