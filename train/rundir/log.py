"""The log of a run: JSON lines, from which results are read, and the same numbers for TensorBoard and a tracker."""

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from egopatch.features.io.files import make_folder
from egopatch.train.rundir.names import BOARD, LOG
from egopatch.train.rundir.run_folder import write_whole
from egopatch.train.rundir.tracking import Tracker, report_failure


class RunLog:
    """`log.jsonl` and TensorBoard events of one run.

    Args:
        step: Number of steps done; later events, left by an interrupted run, are dropped.
        tracker: The run in an experiment tracker, if one is used.
    """

    def __init__(self, folder: Path, step: int, tracker: Tracker | None = None) -> None:
        path = folder / LOG
        _drop_after(path, step)
        self._tracker = tracker
        self._file = path.open("a", encoding="utf-8")
        # TensorBoard's own writer has a thread, which would print the traceback of a full disk.
        self._board = RecordWriter(_new_board(folder / BOARD).open("xb"))
        # Tells TensorBoard to forget what an interrupted run wrote from here on.
        start = SessionLog(status=SessionLog.START)
        try:
            self._add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
            self._add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        except OSError:
            with suppress(OSError):  # closing writes what is buffered again
                self.close()
            raise

    def write(self, event: str, step: int, **values: Any) -> None:
        """Write one line to `log.jsonl`, and its floats to TensorBoard and to the tracker."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        floats = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, float)}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in floats.items()]
        self._add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        if self._tracker is not None and floats:
            self._track(self._tracker.log, step, floats)

    def close(self) -> None:
        """Write pending events and close the files."""
        try:
            self._file.close()
        finally:
            self._board.close()
        if self._tracker is not None:
            self._track(self._tracker.close)

    def _add_event(self, event: Event) -> None:
        self._board.write(event.SerializeToString())
        self._board.flush()

    def _track(self, call: Callable[..., None], *values: Any) -> None:
        """Call the tracker; the run continues without it once it has failed."""
        try:
            call(*values)
        except Exception as error:  # each tracker raises its own kinds
            report_failure(error)
            self._tracker = None


def _new_board(folder: Path) -> Path:
    """A path for a file of events; TensorBoard reads those of a run in the order of the times in their names."""
    make_folder(folder)
    return folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"


def _drop_after(path: Path, step: int) -> None:
    """Keep the complete lines up to `step`; later steps are about to be repeated."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off when the run was killed
    write_whole(path, "".join(kept))
