"""What docs/usage.md says about the result of each command with `--json`."""

import re
from pathlib import Path

USAGE = Path(__file__).resolve().parents[1] / "docs" / "usage.md"


def documented_keys(command: str, also: bool = False, each: bool = False) -> set[str]:
    """The keys that every result of `command` has; with `also`, those that it has under a condition, too.

    Args:
        command: As in the table, such as `extract run`.
        also: Whether to add the keys after the word "also".
        each: Whether to give the keys of each of its entries, after "each with", in place of its own.
    """
    section = USAGE.read_text(encoding="utf-8").split("## Use the commands in scripts")[1].split("\n## ")[0]
    for names, keys in re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE):
        if f"`{command}`" in names:
            own, _, of_each = re.sub(r"\(.*?\)", "", keys).partition(", each with ")
            described, _, conditional = (of_each if each else own).partition("; ")
            return set(re.findall(r"`(\w+)`", described + (conditional if also else "")))
    raise AssertionError(f"docs/usage.md has no row for {command}")
