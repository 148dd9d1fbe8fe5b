"""One line of progress: a live bar on a terminal, a plain line now and then in a file."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 10.0


@dataclass
class Meter:
    """Counts work done and shows it.

    Args:
        label: what is counted, such as `encode`.
        total: how many units there are.
        unit: their name, in the plural.
    """

    label: str
    total: int
    unit: str
    done: int = 0
    nbytes: int = 0
    _started: float = field(default_factory=time.monotonic)
    _printed: float = field(default_factory=time.monotonic)
    _bar: Progress | None = None
    _task: TaskID | None = None

    def advance(self, count: int, nbytes: int = 0) -> None:
        """Add `count` units that came to `nbytes` bytes."""
        self.done += count
        self.nbytes += nbytes
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.done, detail=self._detail())
        elif time.monotonic() - self._printed >= PLAIN_INTERVAL_S:
            self._printed = time.monotonic()
            print(self.line(), flush=True)

    def line(self) -> str:
        """The plain line."""
        return f"{self.label}: {self.done}/{self.total} {self.unit}, {self._detail()}, {self._left()}"

    def _detail(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        size = f", {self.nbytes / 1e6:.1f} MB" if self.nbytes else ""
        return f"{self.done / seconds:.1f} {self.unit}/s{size}"

    def _left(self) -> str:
        seconds = time.monotonic() - self._started
        if not self.done or self.done >= self.total:
            return f"{seconds:.0f} s"
        return f"about {seconds / self.done * (self.total - self.done):.0f} s left"


@contextmanager
def meter(label: str, total: int, unit: str) -> Iterator[Meter]:
    """A `Meter` that is shown while the block runs and prints its last line at the end."""
    shown = Meter(label, total, unit)
    if not sys.stdout.isatty():
        yield shown
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(), transient=True) as bar:
            shown._bar = bar
            shown._task = bar.add_task(label, total=total, detail="")
            yield shown
    print(shown.line(), flush=True)
