"""The code blocks of the documentation: finding them, and running a page from top to bottom in this process.

A block of `bash` or `python` runs in a test, unless the line above it is `<!-- not run: REASON -->`. A block of `text`
that follows a run one is its output; one of `yaml` whose first line is `# NAME.yaml` is written to that file.
"""

import contextlib
import io
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egopatch.__main__ import main as egopatch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
CODE = ("bash", "python")
_FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        line: Line of the page on which it starts.
        language: What stands after the backticks; empty if nothing does.
        text: The lines between them.
        reason: Why no test runs it; None if one does, or if it is no code.
        output: The lines that it prints: those of a block of `text` right below it.
    """

    line: int
    language: str
    text: str
    reason: str | None
    output: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether a test has to run it."""
        return self.language in CODE and self.reason is None

    def commands(self) -> list[str]:
        """The commands of a block of `bash`, a line each, without comments."""
        joined = self.text.replace("\\\n", " ")
        lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines()]
        return [line for line in lines if line]


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = [*_FENCE.finditer(text)]
    return [
        Block(
            text.count("\n", 0, one.start()) + 1,
            one["language"],
            one["text"],
            one["reason"],
            tuple(after["text"].splitlines()) if after and _is_output(text, one, after) else (),
        )
        for one, after in itertools.pairwise([*found, None])
    ]


def _is_output(page: str, block: re.Match[str], after: re.Match[str]) -> bool:
    return after["language"] == "text" and not page[block.end() : after.start()].strip()


def run_page(page: Path, smaller: Mapping[str, str], names: dict[str, Any]) -> Iterator[tuple[Block, list[str]]]:
    """Run a page in the current folder, and yield each code block with the output lines that the page shows for it and
    that did not appear in this order.

    Args:
        page: The page.
        smaller: What to replace in the code, so that it takes less time.
        names: Filled with the names that the page's Python defines.
    """
    names["__name__"] = "__main__"
    for block in blocks(page):
        text = block.text
        for old, new in smaller.items():
            text = text.replace(old, new)
        if block.language == "yaml" and (name := re.match(r"# ([\w.]+\.yaml)\n", text)):
            Path(name[1]).write_text(text)
        if not block.runs:
            continue
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, f"{page.name}:{block.line}", "exec"), names)
            output = out.getvalue()
        else:
            output = "".join(map(_run, Block(block.line, "bash", text, None).commands()))
        printed = map(_skeleton, output.splitlines())
        shown = [line for line in block.output if line.strip() not in ("", "...")]
        # A line that is found uses up those above it, so that the order counts.
        yield block, [line for line in shown if _skeleton(line) not in printed]


def _run(command: str) -> str:
    """What a command of a page prints; `egopatch` runs in this process, which saves its start-up."""
    if command.startswith("make "):
        return "".join(map(_run, made_by(command)))
    words = shlex.split(re.sub(r"^python -m (?=extract|features|train)", "egopatch ", command))
    if words[0] != "egopatch":
        return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = egopatch(words[1:])
    assert code == 0, f"{command}: exit code {code}"
    return out.getvalue()


def made_by(command: str) -> list[str]:
    """The commands that `make TARGETS NAME=VALUE...` runs, by the rules of the Makefile."""
    words = shlex.split(command)[1:]
    values = {"PY": "python"} | dict(word.split("=", 1) for word in words if "=" in word)
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = []
    for target in (word for word in words if "=" not in word):
        rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", rules, re.MULTILINE)
        assert rule is not None, f"the Makefile has no rule for {target}"
        found += [re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], line.strip()) for line in rule[1].splitlines()]
    return found


def _skeleton(line: str) -> str:
    """A line without what varies with the machine and the size of the set: numbers, plurals, hashes, answers."""
    line = re.sub(r"\b[0-9a-f]{64}\b", "HASH", line)
    line = re.sub(r"[+-]?\d[\d.,e+-]*", "0", line.rstrip(" ."))
    line = re.sub(r"\b(above|below|cannot be told apart)\b", "VERDICT", line)
    line = re.sub(r"^ *0% .*", "0% ANSWER", line)
    line = re.sub(r"\b0 [kMG]?B\b|\b0 (s|min|h)\b", "0", line)
    return " ".join(re.sub(r"s\b", "", line).split())  # one shard of few clips, ten shards of many
