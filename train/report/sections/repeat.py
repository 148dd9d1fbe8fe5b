"""How to repeat a report: its commands in order, each system's config, and a digest of the questions."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from egopatch.train.report.answers import Questions
from egopatch.train.report.sources import Sweep
from egopatch.train.rundir.names import CONFIG
from egopatch.train.rundir.results import Results, card_option, data_title


@dataclass(frozen=True)
class Recipe:
    """Commands and configs that repeat the results.

    Attributes:
        commands: Lines for a shell, in order; lines that start with `#` say what follows.
        configs: Name and resolved config, as YAML, of each row's best run.
    """

    commands: tuple[str, ...]
    configs: tuple[tuple[str, str], ...]


def recipe(results: Results, sweeps: Sequence[Sweep], explained: Mapping[Path, int]) -> Recipe:
    """The recipe of everything below a folder of runs.

    Args:
        sweeps: The sweeps beside them.
        explained: Number of explained questions, by the folder of each run whose explanation is shown.
    """
    stores, trained, configs = dict[str, str](), list[str](), list[tuple[str, str]]()
    for row in results.rows:
        for run in row.runs:
            path = str(card_option(run.card, "store", "path"))
            if run.card.get("fingerprint") and path:
                stores.setdefault(path, f"egopatch extract run --config {shlex.quote(str(run.dir / CONFIG))}")
            trained.append(str(run.card.get("command") or f"# no command is recorded in {run.dir}"))
        settings = yaml.safe_dump(dict(row.best.card.get("config") or {}), sort_keys=False, allow_unicode=True)
        questions = data_title(row.split, [row.best.card])
        configs.append((f"{row.label}, {questions}, seed {row.best.seed}", settings))
    swept = [sweep.command for sweep in sweeps if sweep.command]
    explain = [
        f"egopatch train explain --config {shlex.quote(str(folder / CONFIG))} --questions {questions}"
        for folder, questions in explained.items()
    ]
    one = results.rows[0].best.dir / CONFIG
    there = f"--config {shlex.quote(str(one))} --run.table {shlex.quote(str(results.folder))}"
    sections = [
        ("Encode the clips into each store. Finished shards are skipped.", list(stores.values())),
        ("Train and evaluate every run.", trained),
        ("Sweeps", swept),
        ("What the answers depend on", explain),
        ("Table and report", [f"egopatch train {command} {there}" for command in ("table", "report")]),
    ]
    lines = [line for title, commands in sections if commands for line in (f"# {title}", *dict.fromkeys(commands))]
    return Recipe(tuple(lines), tuple(configs))


def digest(questions: Questions) -> str:
    """SHA-256 of ids, clips, texts and answers: equal if two reports are about the same test questions."""
    found = hashlib.sha256()
    for question in questions.by_id.values():
        row = [question.question_id, question.clip_id, question.text, question.answer, *question.options]
        found.update(json.dumps(row).encode() + b"\n")
    return found.hexdigest()
