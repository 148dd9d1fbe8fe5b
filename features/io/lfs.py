"""Git LFS pointers: a clone made without LFS has such a small text file in place of each large file."""

from pathlib import Path

_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST = 1024  # bytes; the specification of Git LFS requires pointers to be smaller


def pointer_fault(path: Path) -> str | None:
    """Fault and remedy for a file that is a pointer of Git LFS, as text that follows the file's name; else None.

    Raises:
        OSError: The file does not exist or cannot be read.
    """
    # Called for every shard that is opened; opening a file twice takes long on a network file system.
    if path.stat().st_size >= _LARGEST:
        return None
    with path.open("rb") as file:
        is_pointer = file.read(len(_POINTER)) == _POINTER
    return "is a pointer of Git LFS, not the file itself; run `git lfs pull` to fetch it" if is_pointer else None
