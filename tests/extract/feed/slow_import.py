"""A function whose module takes as long to import in a child as the test wants: it says when it begins, and waits."""

import os
from pathlib import Path


def prepare(*_: object) -> None:
    """Never reached."""


def _wait_in_child() -> None:
    said, never = (Path(os.environ[name]) for name in ("IMPORTING", "NEVER"))
    if os.getpid() != int(os.environ["PARENT"]):
        with said.open("wb", buffering=0) as pipe:
            pipe.write(b"x")
        never.open("rb").read()  # nobody opens it for writing


_wait_in_child()
