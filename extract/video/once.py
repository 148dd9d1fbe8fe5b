"""What is found out about a video once and then serves all of its clips: the index of its frames, and its hash.

The decoders of a worker share it through files, because the clips of one long video are spread over all of them.
"""

import fcntl
import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from egopatch.extract.video.limits import waiting_for_another_child

Value = TypeVar("Value")
FileVersion = tuple[Path, int, int]  # path, bytes, time of the last change in nanoseconds

IN_MEMORY = 16
IN_FILES = 64  # an hour of video has an index of 3 MB


def version_of(path: Path) -> FileVersion:
    """The version of the file at `path`."""
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns


class OncePerVideo:
    """Values of the most recently used videos.

    Args:
        folder: Temporary folder that this process shares with others; None to share nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._known: OrderedDict[tuple[str, FileVersion], Any] = OrderedDict()

    def find(self, what: str, version: FileVersion, compute: Callable[[], Value]) -> Value:
        """The value called `what` of a version of a file; `compute` finds it unless this was done before."""
        key = what, version
        if key not in self._known:
            self._known[key] = compute() if self._folder is None else _shared(self._folder, key, compute)
            if len(self._known) > IN_MEMORY:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def has(self, what: str, version: FileVersion) -> bool:
        """Whether the value called `what` was found before, by this process or by one that shares the folder."""
        key = what, version
        return key in self._known or (self._folder is not None and _file_of(self._folder, key).exists())


def _file_of(folder: Path, key: tuple[str, FileVersion]) -> Path:
    return folder / hashlib.sha256(repr(key).encode()).hexdigest()


def _shared(folder: Path, key: tuple[str, FileVersion], compute: Callable[[], Value]) -> Value:
    """The value in the file of `key`; while one process computes it, the others wait."""
    try:
        file = _file_of(folder, key).open("a+b", buffering=0)
    except OSError:  # files that are not used for days may be cleaned up; sharing only saves time
        return compute()
    with file:
        with waiting_for_another_child():
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        # It is empty at first, and incomplete if its writer was killed or the disk was full.
        with suppress(EOFError, pickle.UnpicklingError):
            return pickle.loads(file.read())
        value = compute()
        with suppress(OSError):
            file.truncate(0)
            file.write(pickle.dumps(value))
            _keep_newest(folder)
        return value


def _keep_newest(folder: Path) -> None:
    files = list(folder.iterdir())
    if len(files) > IN_FILES:
        oldest = min(files, key=lambda path: path.stat().st_mtime_ns)
        oldest.unlink(missing_ok=True)
