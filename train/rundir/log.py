"""The log of a run: JSON lines, from which results are read, and the same numbers for TensorBoard and a tracker."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

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
        self._board = EventFileWriter(str(folder / BOARD))
        # Tells TensorBoard to forget what an interrupted run wrote from here on.
        start = SessionLog(status=SessionLog.START)
        self._board.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, event: str, step: int, **values: Any) -> None:
        """Write one line to `log.jsonl`, and its floats to TensorBoard and to the tracker."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        floats = {f"{event}/{name}": value for name, value in values.items() if isinstance(value, float)}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in floats.items()]
        self._board.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        if self._tracker is not None and floats:
            self._track(self._tracker.log, step, floats)

    def close(self) -> None:
        """Write pending events and close the files."""
        self._file.close()
        self._board.close()
        if self._tracker is not None:
            self._track(self._tracker.close)

    def _track(self, call: Callable[..., None], *values: Any) -> None:
        """Call the tracker; the run continues without it once it has failed."""
        try:
            call(*values)
        except Exception as error:  # each tracker raises its own kinds
            report_failure(error)
            self._tracker = None


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
