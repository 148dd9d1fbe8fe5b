"""pytest in a process of its own, for tests that need another environment or device than those around them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with `arguments` in the repository; it starts alone, also where this process is one of pytest-xdist's.

    pytest-benchmark, where it is installed, would warn that it does not work beside xdist, and warnings are errors.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
