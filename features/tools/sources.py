"""Hashes the videos from which a store's rows were made, to find those that have changed."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from egopatch.features.common.machine import usable_cores
from egopatch.features.common.os_errors import with_remedy
from egopatch.features.storage.pick import storage_at
from egopatch.features.tools.audit import audit_store
from egopatch.features.values.errors import WrongOption
from egopatch.features.values.location import Location


@dataclass(frozen=True)
class SourceReport:
    """The current state of the videos that a store's rows were made from.

    Attributes:
        files: Number of files that were hashed.
        changed: Name of each file whose bytes have changed since clips were made from it -> the ids of these clips.
        gone: Number of files that no longer exist, which is not a fault.
        unrecorded: Number of clips that an earlier version stored without the name of their file.
        unreadable: Name of each file that exists and could not be read -> why.
    """

    files: int
    changed: Mapping[str, tuple[str, ...]]
    gone: int
    unrecorded: int
    unreadable: Mapping[str, str]

    @property
    def clips(self) -> tuple[str, ...]:
        """Ids of the clips whose file has changed."""
        return tuple(name for ids in self.changed.values() for name in ids)


def check_sources(
    path: Location | str, folder: Path, on_bytes: Callable[[int, int], None] | None = None
) -> SourceReport:
    """Hash every video that committed clips were made of, and compare it with the ledger.

    Args:
        path: Location of the store.
        folder: The data set's folder, which the recorded names start from.
        on_bytes: Called with the bytes read so far and the bytes to read in all.

    Raises:
        StoreError: The store does not exist.
        WrongOption: The folder holds none of the videos.
    """
    ledger = audit_store(storage_at(path)).ledger
    clips: dict[str, list[str]] = {}
    unrecorded = 0
    for name, origin in ledger.origins().items():
        if origin is None:
            unrecorded += 1
        else:
            clips.setdefault(origin.file, []).append(name)
    sizes: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    for file in clips:
        try:
            if (folder / file).is_file():
                sizes[file] = (folder / file).stat().st_size
        except OSError as error:
            unreadable[file] = with_remedy(error)
    if clips and not sizes and not unreadable:
        raise WrongOption(
            f"--sources is {str(folder)!r}, which holds no video of the store, such as {next(iter(clips))!r}; expected "
            "the folder that these names start from, the config's data.root"
        )
    gone = len(clips) - len(sizes) - len(unreadable)
    changed: dict[str, tuple[str, ...]] = {}
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="hash") as pool:
        for file, digest in zip(sizes, pool.map(lambda file: _sha256(folder / file), sizes), strict=True):
            if isinstance(digest, OSError):
                unreadable[file] = with_remedy(digest)
            elif stale := tuple(name for name in clips[file] if ledger.clips[name].clip(name).source != digest):
                changed[file] = stale
            done += sizes[file]
            if on_bytes is not None:
                on_bytes(done, total)
    return SourceReport(len(clips) - gone - len(unreadable), changed, gone, unrecorded, unreadable)


def _sha256(path: Path) -> str | OSError:
    """The file's hash, or the error that it cannot be read, so that the other files are still hashed."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error
