"""Names of the files of runs and sweeps are written in one place, which costs nothing to import."""

import ast
import subprocess
import sys
from pathlib import Path

from egopatch.train.rundir import names

ROOT = Path(__file__).parents[2]
NAMES = {value for name, value in vars(names).items() if name.isupper()}


def test_no_other_module_writes_them_again() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r} is a constant of train/rundir/names.py"
        for path in sorted((ROOT / "train").rglob("*.py"))
        if path.name != "names.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]
    assert {"card.json", "log.jsonl", "sweep.json"} <= NAMES
    assert not found


def test_they_are_read_without_torch() -> None:
    code = "import sys, egopatch.train.rundir.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
