"""A module whose import in a child announces its start and then blocks for as long as the test needs."""

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
