"""Keeps what is found out about a video once and then used for all of its clips: its index of frames and its hash.

The decoders of all workers on a machine share it through files, because the clips of one long video are spread over all
of them. Faults of a video are shared as well: a file that cannot be indexed is read through once, not once per clip.
"""

import fcntl
import functools
import hashlib
import os
import pickle
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from egopatch.extract.children.limits import SLOWEST_BYTES_PER_S, clock_stopped
from egopatch.extract.video.indexing.index import VideoError
from egopatch.features.io.process import Owner, start_ticks

Value = TypeVar("Value")
FileVersion = tuple[Path, int, int]  # path, bytes, time of the last change in nanoseconds

IN_MEMORY = 16
CLEAN_EVERY = 16  # new values of one process; looking through the folder costs as much as a short clip
IN_FILES = 64  # an hour of video has an index of 3 MB
MOST_DEATHS = 2  # a single process may have been killed for another reason
PATIENCE_S = 60.0  # plus the time to read the file through; the process that computes may be suspended
WAIT_POLL_S = 0.01


def version_of(path: Path) -> FileVersion:
    """The version of the file at `path`."""
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns


class VideoCache:
    """A cache of values computed from the most recently used videos.

    Args:
        folder: Temporary folder that this process shares with others; None to share nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: OrderedDict[tuple[str, FileVersion], Any] = OrderedDict()
        self._added = 0

    def find(self, what: str, version: FileVersion, compute: Callable[[], Value], share: bool = True) -> Value:
        """The value called `what` of a version of a file; `compute` is called unless the value is already known.

        Args:
            what: Name of the value.
            version: The version of the file.
            compute: Finds the value.
            share: Whether to share the value with other processes through a file, which takes about a millisecond.

        Raises:
            VideoError: `compute` raised it, now or before; or two processes have died while they computed it.
        """
        key = what, version
        if key not in self._known:
            folder = self._folder if share else None
            self._known[key] = _try(compute) if folder is None else _shared(folder, key, compute)
            if folder is not None:
                self._added += 1
                if self._added % CLEAN_EVERY == 0:
                    _keep_newest(folder)
            if len(self._known) > IN_MEMORY:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        value = self._known[key]
        if isinstance(value, _Fault):
            raise VideoError(value.message)
        return value

    def has(self, what: str, version: FileVersion) -> bool:
        """Whether the value called `what` was found before, by this process or by one that shares the folder."""
        key = what, version
        return key in self._known or (self._folder is not None and _file_of(self._folder, key).exists())


def _file_of(folder: Path, key: tuple[str, FileVersion]) -> Path:
    what, (path, *version) = key
    return folder / hashlib.sha256(repr((what, path.absolute(), version)).encode()).hexdigest()


@dataclass(frozen=True)
class _Fault:
    """Stands in place of a value: the reason why there is none."""

    message: str


@dataclass(frozen=True)
class _Started:
    """Stands in place of a value that a process has begun to compute, or was interrupted in computing.

    Attributes:
        deaths: Number of earlier processes that died while they computed it.
        worker: The worker whose child has begun; None if the child was interrupted.
    """

    deaths: int
    worker: Owner | None

    def all_deaths(self) -> int:
        """`deaths`, plus the child's, unless its worker has ended too: then the whole job was killed."""
        return self.deaths + (self.worker is not None and self.worker.may_be_alive())


def _try(compute: Callable[[], Value]) -> Value | _Fault:
    try:
        return compute()
    except VideoError as error:
        return _Fault(str(error))


def _shared(folder: Path, key: tuple[str, FileVersion], compute: Callable[[], Value]) -> Value | _Fault:
    """The value in the file of `key`; while one process computes it, the others wait, but not forever."""
    try:
        file = _file_of(folder, key).open("a+b", buffering=0)
    except OSError:  # files that are not used for days may be cleaned up; sharing only saves time
        return _try(compute)
    with file:
        with clock_stopped():  # the child that computes has limits of its own
            locked = _locked(file, PATIENCE_S + key[1][1] / SLOWEST_BYTES_PER_S)
        if not locked:
            return _try(compute)
        file.seek(0)
        found: Any = None
        # The file is empty at first, and incomplete if the disk was full.
        with suppress(EOFError, pickle.UnpicklingError):
            found = pickle.loads(file.read())
        if found is not None and not isinstance(found, _Started):
            return found
        deaths = found.all_deaths() if isinstance(found, _Started) else 0
        if deaths == MOST_DEATHS:
            what, (path, *_) = key
            return _Fault(
                f"video {path} cannot be read through ({what}): {deaths} decoders were killed while they read it"
            )
        _write(file, _Started(deaths, _worker(os.getppid())))
        try:
            value = _try(compute)
        except BaseException:
            _write(file, _Started(deaths, None))  # this process lives: the cause, such as a lost connection, may pass
            raise
        _write(file, value)
        return value


def _locked(file: BinaryIO, patience_s: float) -> bool:
    """Lock the file; False if another process still holds it after `patience_s`."""
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(WAIT_POLL_S)


@functools.cache
def _worker(pid: int) -> Owner:
    """The process `pid` of this machine."""
    return replace(Owner.this_process(), pid=pid, ticks=start_ticks(pid) or 0)


def _write(file: BinaryIO, value: object) -> None:
    with suppress(OSError):
        file.truncate(0)
        file.write(pickle.dumps(value))


def _keep_newest(folder: Path) -> None:
    with suppress(OSError):  # other processes clean up too
        newest_last = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in newest_last[:-IN_FILES]:
            path.unlink()
