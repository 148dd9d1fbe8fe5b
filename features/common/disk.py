"""Free space where a file is going to be written."""

import shutil
from pathlib import Path


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest parent of it that exists."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that `path` is on, or will be on."""
    return shutil.disk_usage(nearest_existing(path)).free
