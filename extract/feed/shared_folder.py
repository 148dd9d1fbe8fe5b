"""A temporary folder in which decoder children share their cache of videos (`extract.video.indexing.cache`)."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from egopatch.configs.schema import VideoConfig

_NEW_PREFIX = "egopatch-new-"
_PREFIX = "egopatch-decoders-"  # whatever has this name is removed when nobody holds it
_TRIES = 100
_TRY_S = 0.01


class SharedFolder:
    """A folder for the children of one user's workers on this machine, whichever job they belong to.

    Its last worker removes it; if all its workers were killed, the next worker on the machine does. Workers with other
    settings have another folder, because the limits decide which videos kill a decoder.
    """

    def __init__(self, video: VideoConfig) -> None:
        _remove_abandoned()
        digest = hashlib.sha256(repr(video).encode()).hexdigest()[:16]
        shared = Path(tempfile.gettempdir()) / f"{_PREFIX}{os.geteuid()}-{digest}"
        self.path, self._lock = _join(shared) or _private_folder()

    def remove(self) -> None:
        """Leave the folder; the last one removes it."""
        with suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while another worker holds it
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _join(path: Path) -> tuple[Path, int] | None:
    """Make the folder unless it exists, and lock it; None if that fails, for instance if another user made it."""
    for _ in range(_TRIES):
        try:
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # removed in between
            continue
        except OSError:
            return None
        status = os.fstat(handle)
        # Children trust what they find there, and anybody may make a folder of this name.
        mine = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        with suppress(OSError):
            # The system ends the lock with this process, however it ends.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if mine and path.stat().st_ino == status.st_ino:
                return path, handle
        os.close(handle)
        if not mine:
            return None
        time.sleep(_TRY_S)  # another worker is removing it
    return None


def _private_folder() -> tuple[Path, int]:
    unnamed = Path(tempfile.mkdtemp(prefix=_NEW_PREFIX))
    lock = os.open(unnamed, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    # It is locked before it gets the name by which other workers look for abandoned folders.
    return unnamed.rename(unnamed.with_name(_PREFIX + unnamed.name.removeprefix(_NEW_PREFIX))), lock


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or being removed
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), folder.stat()):  # else another worker has made it anew
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)
