"""Progress of a download: a bar with its speed on a terminal, a plain line now and then in a file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from egopatch.extract.progress import PLAIN_INTERVAL_S


@contextmanager
def transfer_meter(label: str, size: int | None, out: TextIO) -> Iterator[Callable[[int, int | None], None]]:
    """Show one transfer on `out` while the block runs.

    Yields:
        A function of the bytes that are there and the bytes in all (None if unknown).
    """
    if out.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(file=out), transient=True) as bar:
            task = bar.add_task(label, total=size)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def line(done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_INTERVAL_S:
            last = time.monotonic()
            of = "" if total is None else f" of {total / 1e6:.0f}"
            print(f"fetch {label}: {done / 1e6:.0f}{of} MB", file=out, flush=True)

    yield line
