"""File names of runs and sweeps are defined in one place, which is cheap to import."""

import ast
import subprocess
import sys
from pathlib import Path

from egopatch.train.rundir import names

ROOT = Path(__file__).parents[2]
NAMES = {value for name, value in vars(names).items() if name.isupper()}


def test_no_other_module_repeats_the_file_names() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r} is a constant of train/rundir/names.py"
        for path in sorted((ROOT / "train").rglob("*.py"))
        if path.name != "names.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]
    assert {"card.json", "log.jsonl", "sweep.json"} <= NAMES
    assert not found


def test_file_names_are_imported_without_torch() -> None:
    code = "import sys, egopatch.train.rundir.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
