"""The file system that a file is on, or is going to be written to."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class FileSystem:
    """A mounted file system: its kind, such as `ext4` or `nfs4`, and where it is mounted."""

    kind: str
    mount: str

    def __str__(self) -> str:
        return f"the {self.kind} file system at {self.mount}"


def file_system_of(path: Path) -> FileSystem | None:
    """The file system of `path`; None where the machine does not tell."""
    resolved = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if resolved.is_relative_to(part.mountpoint)]
    nearest = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return None if nearest is None else FileSystem(nearest.fstype, nearest.mountpoint)


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest parent of it that exists."""
    absolute = path.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.exists())


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that `path` is on, or will be on."""
    return shutil.disk_usage(nearest_existing(path)).free
