"""Checks Python and its packages before anything else; otherwise a library would fail with a traceback.

This file, `egopatch/interrupt.py` and `egopatch/__init__.py` use only syntax that Python 3.8 can read.
"""

import sys
from importlib.util import find_spec

USE = "use .venv/bin/python, which `make setup` makes, or activate it: source .venv/bin/activate"


def require_environment() -> None:
    """Exit with a one-line message if Python is older than 3.11 or the dependencies are missing.

    They are missing, for instance, when the checkout's `.venv` is not active.

    Raises:
        SystemExit: Python is too old, or the dependencies are missing.
    """
    python = f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info < (3, 11):  # noqa: UP036 - no installer has looked at a checkout
        raise SystemExit(f"{python}; expected Python 3.11 or newer: {USE}")
    if find_spec("jsonargparse") is None:
        raise SystemExit(f"{python} without the packages that egopatch needs; {USE}")
