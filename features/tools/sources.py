"""Hashing the videos again that a store's rows were made of."""

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from egopatch.features.common.machine import usable_cores
from egopatch.features.storage.pick import storage_at
from egopatch.features.tools.verify import audit_store
from egopatch.features.values.location import Location, parse_location


@dataclass(frozen=True)
class SourceReport:
    """The videos that a store's rows were made of, as they are now.

    Attributes:
        files: Number of files that were hashed.
        changed: Name of each file whose bytes differ from those that clips were made of -> the ids of these clips.
        gone: Number of files that do not exist any more, which is no fault.
        unrecorded: Number of clips that an earlier version stored without the name of their file.
    """

    files: int
    changed: Mapping[str, tuple[str, ...]]
    gone: int
    unrecorded: int

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
        OSError: A file exists but cannot be read.
    """
    ledger = audit_store(storage_at(parse_location(path))).ledger
    clips: dict[str, list[str]] = {}
    unrecorded = 0
    for name, origin in ledger.origins().items():
        if origin is None:
            unrecorded += 1
        else:
            clips.setdefault(origin.file, []).append(name)
    sizes = {file: (folder / file).stat().st_size for file in clips if (folder / file).is_file()}
    changed: dict[str, tuple[str, ...]] = {}
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="hash") as pool:
        for file, digest in zip(sizes, pool.map(lambda file: _sha256(folder / file), sizes), strict=True):
            if stale := tuple(name for name in clips[file] if ledger.clips[name].clip(name).source != digest):
                changed[file] = stale
            done += sizes[file]
            if on_bytes is not None:
                on_bytes(done, total)
    return SourceReport(len(sizes), changed, len(clips) - len(sizes), unrecorded)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
