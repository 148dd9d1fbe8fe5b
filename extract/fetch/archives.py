"""Unpacking untrusted archives: no file outside the folder, no full disk, all members or none.

Members are unpacked to a staging folder first and moved into place when all of them are complete.
"""

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from egopatch.features.common.disk import free_bytes
from egopatch.features.common.units import format_bytes
from egopatch.features.io.lfs import pointer_fault

# Bytes that unpacking leaves free, so that the machine can still work.
RESERVE = 256 << 20
_BLOCK = 1 << 20


class ArchiveError(RuntimeError):
    """An archive was refused; the message names it and the member in one line, and says what to do."""


def unpack(archive: Path, folder: Path) -> tuple[int, int]:
    """Unpack a zip or tar file (compressed or not) into `folder`, replacing files of the same name.

    Returns:
        Number of files and bytes.

    Raises:
        ArchiveError: The file is neither zip nor tar, is damaged, contains a link, a device or a path that leaves the
            folder, or unpacks to more than the free disk space (less RESERVE); `folder` is then unchanged.
    """
    staging = folder / f".{archive.name}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with _readable(archive):
            if zipfile.is_zipfile(archive):
                files, size = _unzip(archive, staging)
            else:
                files, size = _untar(archive, staging)
        for source in [path for path in staging.rglob("*") if not path.is_dir()]:
            target = folder / source.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return files, size


def _unzip(archive: Path, folder: Path) -> tuple[int, int]:
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        budget = _Budget(archive, folder)
        for member in members:  # sizes are known before the first byte is written, and no more than that is read
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ArchiveError(_refused(archive, member.filename, "is neither a file nor a folder"))
            _check_name(archive, member.filename)
            budget.take(member.file_size)
        opened.extractall(folder)
    return sum(not member.is_dir() for member in members), budget.taken


def _untar(archive: Path, folder: Path) -> tuple[int, int]:
    files = 0
    with tarfile.open(archive) as opened:
        budget = _Budget(archive, folder)
        for member in opened:
            if not (member.isfile() or member.isdir()):
                raise ArchiveError(_refused(archive, member.name, "is neither a file nor a folder"))
            _check_name(archive, member.name)
            budget.take(member.size)
            opened.extract(member, folder, filter=_with_our_mode)
            files += member.isfile()
        while opened.fileobj is not None and opened.fileobj.read(_BLOCK):  # gzip's checksum is behind the archive's end
            pass
    return files, budget.taken


def _with_our_mode(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """The member as `tarfile.data_filter` leaves it, to be written with the modes that the umask gives."""
    return tarfile.data_filter(member, folder).replace(mode=None, deep=False)  # type: ignore[arg-type]


class _Budget:
    """Counts the unpacked bytes against the disk space that was free at the start."""

    def __init__(self, archive: Path, folder: Path):
        self.archive = archive
        self.taken = 0
        self.free = max(0, free_bytes(folder) - RESERVE)

    def take(self, size: int) -> None:
        self.taken += size
        if self.taken > self.free:
            raise ArchiveError(
                f"{self.archive}: unpacks to {format_bytes(self.taken)} or more, but only {format_bytes(self.free)} "
                f"may be used, because {format_bytes(RESERVE)} must stay free; free some disk space, or do not trust "
                "this archive"
            )


def _check_name(archive: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not name.strip("/"):
        raise ArchiveError(_refused(archive, name, "would be unpacked outside its folder"))


def _refused(archive: Path, name: str, why: str) -> str:
    return f"{archive}: member {name!r} {why}; nothing was unpacked: do not trust this archive"


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    """Turn errors in the file itself into one line."""
    try:
        yield
    except ArchiveError:
        raise
    except Exception as error:  # readers of archives raise many types over damaged bytes
        # gzip and bz2 raise an OSError that is not the system's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if fault := pointer_fault(archive):
            raise ArchiveError(f"{archive} {fault}") from None
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise ArchiveError(
            f"{archive}: not a zip or tar file, or damaged or truncated ({reason}); delete it and download it again"
        ) from None
