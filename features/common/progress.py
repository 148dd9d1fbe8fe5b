"""Shows progress: a live bar on a terminal, a changing line in a notebook, a line every ten seconds in a log."""

import multiprocessing
import sys
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from egopatch.features.common.units import format_bytes

PLAIN_INTERVAL_S = 10.0
NOTEBOOK_INTERVAL_S = 0.5
BYTES = "bytes"


class ProgressDisplay:
    """Shows one task. A context manager.

    Args:
        label: The task, such as `encode`.
        total: Number of units in the task; None if unknown.
        unit: Name of the units, in the plural; `BYTES` are shown as sizes.
        done: Units that were done before.
        out: Stream to show it on; standard output by default.
        summary: Whether to print a last line when the block ends.
        silent: Whether to show nothing at all.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        done: int = 0,
        out: TextIO | None = None,
        summary: bool = True,
        silent: bool = False,
    ) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._out = sys.stdout if out is None else out
        self._summary, self._silent = summary, silent
        self._before, self._nbytes, self._detail = done, 0, ""
        self._started = self._printed = time.monotonic()
        # A notebook's stream is not a terminal, but a carriage return in it replaces the last line.
        self._in_place = type(self._out).__module__ == "ipykernel.iostream"
        self._interval_s = NOTEBOOK_INTERVAL_S if self._in_place else PLAIN_INTERVAL_S
        self._width = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "ProgressDisplay":
        # Processes side by side would draw their bars over one another.
        alone = multiprocessing.parent_process() is None
        if self._out.isatty() and alone and not self._silent:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, *times, console=Console(file=self._out), transient=True)
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, detail="")
            self._bar.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._width and not (self._summary and error is None):
            print(file=self._out, flush=True)  # so that later output does not continue the last line
        if self._summary and not self._silent and error is None:
            self._print(last=True)

    def advance(self, count: int, nbytes: int = 0) -> None:
        """Add `count` finished units of `nbytes` bytes in all."""
        self._nbytes += nbytes
        self.update(self.done + count)

    def update(self, done: int, total: int | None = None, detail: str = "") -> None:
        """Set the number of units done; `total` replaces the number of units, and `detail` the rate."""
        self.done, self._detail = done, detail
        self.total = self.total if total is None else total
        if self._bar is not None and self._task is not None:
            shown = f"{self._count()}, {self._rate()}"
            self._bar.update(self._task, completed=done, total=self.total, detail=shown)
        elif not self._silent and time.monotonic() - self._printed >= self._interval_s and not self._is_last():
            self._printed = time.monotonic()
            self._print(last=False)

    def _is_last(self) -> bool:
        """Whether the summary's line will repeat this one."""
        return self._summary and self.done == self.total

    def line(self) -> str:
        """The plain line."""
        return f"{self.label}: {self._count()}, {self._rate()}, {self._time()}"

    def _print(self, last: bool) -> None:
        if not self._in_place:
            print(self.line(), file=self._out, flush=True)
            return
        line = self.line()
        # Blanks cover what is left of a longer line.
        print(f"\r{line:<{self._width}}", end="\n" if last else "", file=self._out, flush=True)
        self._width = len(line)

    def _count(self) -> str:
        if self.unit == BYTES:
            return format_bytes(self.done) + ("" if self.total is None else f" of {format_bytes(self.total)}")
        return f"{self.done}{'' if self.total is None else f'/{self.total}'} {self.unit}"

    def _rate(self) -> str:
        if self._detail:
            return self._detail
        rate = (self.done - self._before) / max(time.monotonic() - self._started, 1e-9)
        if self.unit == BYTES:
            return f"{format_bytes(rate)}/s"
        return f"{rate:.1f} {self.unit}/s" + (f", {self._nbytes / 1e6:.1f} MB" if self._nbytes else "")

    def _time(self) -> str:
        seconds, done = time.monotonic() - self._started, self.done - self._before
        if self.total is None or done <= 0 or self.done >= self.total:
            return f"{seconds:.0f} s"
        return f"about {seconds / done * (self.total - self.done):.0f} s left"
