"""Provides required files: checks those that exist, downloads and unpacks the others, and pins each by its SHA-256."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pooch

from egopatch.extract.fetch.archives import ArchiveError, unpack
from egopatch.extract.fetch.download import DownloadError, fetch, part_of, remote_size
from egopatch.extract.fetch.lockfile import LockEntry, Lockfile
from egopatch.extract.fetch.required import RequiredFile
from egopatch.features.common.disk import free_bytes, nearest_existing
from egopatch.features.common.os_errors import with_remedy
from egopatch.features.common.progress import BYTES, ProgressDisplay
from egopatch.features.common.units import counted, format_bytes
from egopatch.features.io.files import write_file
from egopatch.features.io.lfs import pointer_fault
from egopatch.features.values.errors import StoreError

BY_HAND = "by hand"

State = Literal["there", "locked", "fetched", "missing", "failed"]


@dataclass(frozen=True)
class FileStatus:
    """A required file after it was checked or downloaded.

    Attributes:
        required: The required file.
        state: `there`: present and as locked; `locked`: present and seen for the first time; `fetched`: downloaded;
            `missing`: to be put there by hand; `failed`.
        message: What was found, or what to do, in one line.
        size: Size in bytes, if known.
        sha256: SHA-256 in hex, if known.
    """

    required: RequiredFile
    state: State
    message: str
    size: int | None = None
    sha256: str | None = None

    @property
    def good(self) -> bool:
        """Whether the file is present and right."""
        return self.state in ("there", "locked", "fetched")


def provide(required: tuple[RequiredFile, ...], lockfile: Lockfile, *, offline: bool) -> list[FileStatus]:
    """Check existing files against the lock file and download the missing ones; progress is printed.

    Args:
        required: Files, as from `required_files`.
        lockfile: Entries that are enforced; files that are seen for the first time are added.
        offline: Whether to use no network; the user then puts missing files in place.

    Returns:
        The status of each file. One that fails, or for which the disk has no room, does not stop the others.
    """
    todo = [need for need in required if not offline and need.link is not None and _is_absent(need)]
    sizes = {need.name: remote_size(need.link) for need in todo if need.link is not None}
    too_large = _announce(todo, sizes)
    statuses = []
    for need in required:
        try:
            if need.name in too_large:
                raise DownloadError(too_large[need.name])
            status = _provide_file(need, lockfile, offline, sizes.get(need.name))
        except BrokenPipeError:  # nobody reads the output any more; a server's broken pipe is a DownloadError
            raise
        except (DownloadError, ArchiveError, StoreError, OSError) as error:  # a StoreError where files cannot be locked
            status = FileStatus(need, "failed", with_remedy(error))
        statuses.append(status)
    return statuses


def files_as_json(statuses: Sequence[FileStatus], lockfile: Lockfile) -> dict[str, Any]:
    """The files as `{"lock", "files": [{"name", "file", "state", "message", "bytes", "sha256"}]}`."""
    files = [
        {
            "name": status.required.name,
            "file": str(status.required.file),
            "state": status.state,
            "message": status.message,
            "bytes": status.size,
            "sha256": status.sha256,
        }
        for status in statuses
    ]
    return {"lock": str(lockfile.path), "files": files}


def format_files(statuses: Sequence[FileStatus]) -> str:
    """The files as text, a line each."""
    return "\n".join(
        f"{status.state:<8} {(file := status.required.file)}: {status.message.removeprefix(f'{file}: ')}"
        for status in statuses
    )


def _is_absent(need: RequiredFile) -> bool:
    try:
        return not need.file.exists() and not need.unpacked()
    except OSError:  # such as another user's folder; providing the file reports it
        return False


def _announce(todo: list[RequiredFile], sizes: dict[str, int | None]) -> dict[str, str]:
    """Print sizes and free space before downloading; returns the reason for each file that there is no room for."""
    disks = {_disk(need.file): need.file.parent for need in todo}
    free = {disk: free_bytes(folder) for disk, folder in disks.items()}
    needed, room = dict.fromkeys(disks, 0), dict(free)
    too_large: dict[str, str] = {}
    for source in {need.source.name: need.source for need in todo if need.source is not None}.values():
        print(f"{source.name}: {source.purpose}; terms: {source.terms}; from {source.page}", flush=True)
    for need in todo:
        size = sizes[need.name]
        begun = part_of(need.file).stat().st_size if part_of(need.file).exists() else 0
        announced = "size unknown" if size is None else format_bytes(size)
        print(f"  {need.file}: {announced}, of which {format_bytes(begun)} are downloaded already")
        # An archive takes twice its size until it is deleted, because it unpacks to at least its own size.
        left = 0 if size is None else size * (2 if need.contents else 1) - begun
        disk = _disk(need.file)
        needed[disk] += left
        if left <= room[disk]:
            room[disk] -= left
        else:
            too_large[need.name] = (
                f"{need.file}: needs {format_bytes(left)}{', its contents included' if need.contents else ''}, but its"
                f" disk has room for {format_bytes(room[disk])} more; free some disk space, or set data.root and"
                " encoder.checkpoint to another disk"
            )
    for disk, folder in disks.items():
        print(
            f"  {format_bytes(needed[disk])} needed at {folder}, unpacked archives included;"
            f" {format_bytes(free[disk])} free there",
            flush=True,
        )
    return too_large


def _disk(path: Path) -> int:
    return nearest_existing(path).stat().st_dev


def _provide_file(need: RequiredFile, lockfile: Lockfile, offline: bool, size: int | None) -> FileStatus:
    locked = lockfile.get(need.name)
    if need.source is None:
        found = need.file.exists()
        return FileStatus(
            need, "there" if found else "missing", "your own, not published" if found else "your own file"
        )
    if not need.file.exists() and need.unpacked():
        return _unpacked_without_archive(need, locked)
    if need.file.exists():
        status = _check(need, lockfile, None if offline else need.link)
    elif offline or need.link is None:
        return FileStatus(need, "missing", _by_hand(need, locked))
    else:
        with ProgressDisplay(f"fetch {need.name}", size, BYTES, summary=False) as display:
            fetch(need.link, need.file, None if locked is None else locked.sha256, display.update)
        status = _present(need, lockfile, "fetched")
    if not status.good:
        return status
    if need.folder is not None and (need.read_record().get("sha256") != status.sha256 or not need.unpacked()):
        _unpack(need, status.sha256)
    if locked is None:  # an archive is locked only after it could be unpacked
        assert status.sha256 is not None
        assert status.size is not None
        origin = need.link if status.state == "fetched" and need.link is not None else BY_HAND
        lockfile.record(need.name, LockEntry(status.sha256, status.size, origin))
    return status


def _check(need: RequiredFile, lockfile: Lockfile, link: str | None) -> FileStatus:
    """Check an existing file against its lock entry, or against the size at the link if it has no entry yet."""
    locked = lockfile.get(need.name)
    if fault := pointer_fault(need.file):
        return FileStatus(need, "failed", f"{need.file} {fault}")
    if locked is None:
        size, announced = need.file.stat().st_size, None if link is None else remote_size(link)
        if announced is not None and announced != size:
            message = (
                f"{need.file}: has {size} bytes, but {link} has {announced}; delete it and run the same command again"
            )
            return FileStatus(need, "failed", message)
        return _present(need, lockfile, "locked")
    sha256 = pooch.file_hash(str(need.file))
    if sha256 != locked.sha256:
        return FileStatus(
            need,
            "failed",
            f"{need.file}: its SHA-256 is {sha256}, but {lockfile.path} locks {locked.sha256}; the file has changed."
            " Delete it and run the same command again; if the change is intended, delete its entry from the lock file",
        )
    return FileStatus(need, "there", "as locked", locked.size, sha256)


def _present(need: RequiredFile, lockfile: Lockfile, state: State) -> FileStatus:
    """Status of a good file, with its hash; pooch has already checked the hash of a locked file."""
    entry = lockfile.get(need.name)
    sha256 = pooch.file_hash(str(need.file)) if entry is None else entry.sha256
    return FileStatus(need, state, f"locked in {lockfile.path}", need.file.stat().st_size, sha256)


def _unpacked_without_archive(need: RequiredFile, locked: LockEntry | None) -> FileStatus:
    sha256 = need.read_record().get("sha256")
    if sha256 is None:
        return FileStatus(need, "there", f"its folders are in {need.folder}, put there by hand; doctor checks them")
    if locked is not None and sha256 != locked.sha256:
        message = f"{need.folder}: was unpacked from a different {need.file.name} ({sha256}) than the locked one"
        message += f" ({locked.sha256}); delete its folders and run the same command again"
        return FileStatus(need, "failed", message)
    return FileStatus(need, "there", f"unpacked in {need.folder}; the archive was deleted", sha256=sha256)


def _by_hand(need: RequiredFile, locked: LockEntry | None) -> str:
    assert need.source is not None
    how = need.source.by_hand or f"download {need.link}"
    expected = "" if locked is None else f"; its SHA-256 must be {locked.sha256}"
    return f"{how}; put it at {need.file}{expected}; then run the same command again"


def _unpack(need: RequiredFile, sha256: str | None) -> None:
    assert need.folder is not None
    print(f"unpacking {need.file}", flush=True)
    _write_record(need, {"sha256": sha256, "complete": False})
    try:
        files, size = unpack(need.file, need.folder)
    except ArchiveError:
        need.record.unlink()
        raise
    if not any(folder.is_dir() for folder in need.contents):
        need.record.unlink()
        expected = " or ".join(map(str, need.contents))
        raise ArchiveError(
            f"{need.file}: unpacked {counted(files, 'file')} into {need.folder}, but no {expected}; see its page"
        )
    _write_record(need, {"sha256": sha256, "complete": True, "files": files, "bytes": size})
    print(f"unpacked {counted(files, 'file')}, {format_bytes(size)}; {need.file} may be deleted now", flush=True)


def _write_record(need: RequiredFile, record: dict[str, Any]) -> None:
    write_file(need.record, json.dumps(record).encode())
