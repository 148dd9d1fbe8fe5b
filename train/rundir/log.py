"""What training says: JSON lines as the truth, TensorBoard beside them, a bar or plain lines for people."""

import json
import multiprocessing
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
    """`log.jsonl` and TensorBoard events of one run.

    Args:
        folder: of the run.
        step: steps already done; later events, of a run that was interrupted after them, are dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "log.jsonl"
        _drop_after(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._board = EventFileWriter(str(folder / "tb"))
        # Tells TensorBoard to forget what an interrupted run wrote from here on.
        start = SessionLog(status=SessionLog.START)
        self._board.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line of `log.jsonl`; its floats go to TensorBoard as well."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        scalars = [
            Summary.Value(tag=f"{event}/{name}", simple_value=value)
            for name, value in values.items()
            if isinstance(value, float)
        ]
        self._board.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        """Write out what is pending."""
        self._file.close()
        self._board.close()


class Display:
    """Progress for people: a bar on a terminal, a line now and then in a file. A context manager.

    Args:
        label: what is going on.
        step: steps already done.
        steps: of the whole.
        silent: on all ranks but the first.
    """

    def __init__(self, label: str, step: int, steps: int, silent: bool = False) -> None:
        self._label, self._silent = label, silent
        self._first, self._steps = step, steps
        self._started = self._printed = time.monotonic()
        self._bar: Progress | None = None
        # Of processes side by side, each would draw its bar over the others'.
        alone = multiprocessing.parent_process() is None
        if sys.stdout.isatty() and alone and not silent:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
            self._bar = Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(), transient=True
            )
            self._task = self._bar.add_task(label, total=steps, completed=step, detail="")

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, step: int, detail: str) -> None:
        """Where things are now."""
        if self._bar:
            self._bar.update(self._task, completed=step, detail=detail)
        elif not self._silent and time.monotonic() - self._printed >= PLAIN_INTERVAL_S:
            self._printed = time.monotonic()
            seconds = time.monotonic() - self._started
            left = seconds / max(1, step - self._first) * (self._steps - step)
            print(f"{self._label}: step {step}/{self._steps}, {detail}, about {left:.0f} s left", flush=True)


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
