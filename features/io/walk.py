"""The files in a folder and in the folders below it; links are followed."""

import os
from pathlib import Path


def files_below(folder: Path, hidden: bool) -> list[Path]:
    """Everything below `folder` except folders; with `hidden`, also names that begin with a dot.

    Links to folders are followed, but a folder that several paths lead to is read by one of them: by the path without a
    link, if there is one.

    Raises:
        OSError: A folder cannot be read; without its files the list would look complete.
    """
    files, read, to_read = list[Path](), set[str](), [folder]
    for top in to_read:  # which grows: links come after all folders that are reached without them
        for parent, folders, names in os.walk(top, onerror=_refuse):
            if (real := os.path.realpath(parent)) in read:
                folders.clear()
                continue
            read.add(real)
            folders[:] = sorted(name for name in folders if hidden or name[0] != ".")
            # os.walk enters those that are no links.
            to_read += [path for name in folders if (path := Path(parent, name)).is_symlink()]
            files += [Path(parent, name) for name in names if hidden or name[0] != "."]
    return files


def _refuse(error: OSError) -> None:
    # An ext4 disk has this folder at its top; only root can read it, and only a repair of the disk puts files there.
    if not (isinstance(error, PermissionError) and Path(error.filename).name == "lost+found"):
        raise error


def is_file_or_lost(path: Path) -> bool:
    """Whether it is a file, or a dangling link such as git-annex leaves, whose file a user would miss."""
    return path.is_file() or (path.is_symlink() and not path.exists())
