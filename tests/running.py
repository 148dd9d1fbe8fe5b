"""Commands that tests run as a user does."""

import os
import subprocess
from pathlib import Path


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PYTHONPATH": str(path)})
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
