"""What a run says while it trains: JSON lines as the truth, TensorBoard beside them, a bar or lines for people."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

PLAIN_INTERVAL_S = 10.0


class RunLog:
    """The log of one run; a context manager.

    Args:
        folder: of the run.
        step: steps already done; later events of an interrupted run are dropped.
        steps: of the whole run.
        label: shown to people.
        quiet: show nothing.
    """

    def __init__(self, folder: Path, step: int, steps: int, label: str, quiet: bool = False) -> None:
        self._path = folder / "log.jsonl"
        self._steps = steps
        self._label = label
        self._quiet = quiet
        self._started = self._printed = time.monotonic()
        self._first = step
        _drop_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = EventFileWriter(str(folder / "tb"))
        self._board.add_event(
            Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
        )
        self._bar: Progress | None = None
        self._last = ""
        if sys.stdout.isatty() and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console())
            self._task = self._bar.add_task(label, total=steps, completed=step, detail="")
            self._bar.start()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()
        self._board.close()
        if self._bar:
            self._bar.stop()

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line of `log.jsonl`; its numbers go to TensorBoard as well."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        scalars = [
            Summary.Value(tag=f"{event}/{name}", simple_value=value)
            for name, value in values.items()
            if isinstance(value, float)
        ]
        self._board.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def show(self, step: int, detail: str) -> None:
        """Tell people where the run is: on a terminal at once, in a file now and then."""
        if self._bar:
            self._bar.update(self._task, completed=step, detail=detail)
        elif time.monotonic() - self._printed >= PLAIN_INTERVAL_S and not self._quiet:
            self._printed = time.monotonic()
            seconds = time.monotonic() - self._started
            left = seconds / max(1, step - self._first) * (self._steps - step)
            print(f"{self._label}: step {step}/{self._steps}, {detail}, about {left:.0f} s left", flush=True)

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        elif not self._quiet:
            print(line, flush=True)


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`: what came later is about to be done again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off when the run was killed
    path.write_text("".join(kept), encoding="utf-8")
