"""Reading back every committed clip, and naming those that differ from what was committed."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from egopatch.features.common.machine import usable_cores
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.text_substore import TEXT_FOLDER, substores
from egopatch.features.tools.audit import Audit, Fault, audit_store
from egopatch.features.values.dtypes import row_bytes
from egopatch.features.values.errors import DamagedStore, NoStore
from egopatch.features.values.location import Location


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        path: Location of the store.
        clips: Number of committed clips.
        texts: Number of committed texts in the text substore.
        shards: Number of shards that were read, those of the text substore included.
        nbytes: Bytes that were read, likewise.
        seconds: Time that reading took.
        faults: All faults.
    """

    path: Location
    clips: int
    texts: int
    shards: int
    nbytes: int
    seconds: float
    faults: tuple[Fault, ...]

    @property
    def ok(self) -> bool:
        """Whether the store has no fault."""
        return not self.faults

    @property
    def only_unfinished(self) -> bool:
        """Whether the only fault is a text substore whose creation was interrupted: `extract run` finishes it."""
        return [fault.where for fault in self.faults] == [TEXT_FOLDER]

    @property
    def bad_clips(self) -> tuple[str, ...]:
        """Ids that the faults name, each once."""
        return tuple(dict.fromkeys(name for fault in self.faults for name in fault.clips))

    @property
    def bad_texts(self) -> frozenset[str]:
        """Those of `bad_clips` that are texts of the text substore."""
        in_text = (fault for fault in self.faults if fault.where.startswith(f"{TEXT_FOLDER}/"))
        return frozenset(name for fault in in_text for name in fault.clips)


def verify(path: Location | str, on_bytes: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read all committed rows and compare them with the ledger; also check the store's description for consistency.

    Args:
        path: Location of the store; its text substore is verified too.
        on_bytes: Called with the bytes read so far and the bytes to read in all.

    Raises:
        OtherVersion: Another version of this program wrote the store.
        NoStore: The store does not exist.
        StoreError: The storage cannot be reached.
    """
    storage, started = storage_at(path), time.monotonic()
    audits = {"": audit_store(storage)}
    faults = list(audits[""].faults)
    for folder in substores(storage)[1:]:
        try:
            audits[folder] = audit_store(storage_at(storage.location / folder))
            faults += [_in_folder(folder, fault) for fault in audits[folder].faults]
        except NoStore as error:
            faults.append(Fault(TEXT_FOLDER, f"is unfinished: {error}"))
    shards = sum(len(audit.shards) for audit in audits.values())
    total = sum(audit.nbytes for audit in audits.values())
    done = 0
    for folder, audit in audits.items():
        for size, shard_faults in check_shards(audit):
            faults += [_in_folder(folder, fault) for fault in shard_faults]
            done += size
            if on_bytes is not None:
                on_bytes(done, total)
    clips, texts = (len(audits[folder].ledger.clips) if folder in audits else 0 for folder in ("", TEXT_FOLDER))
    return VerifyReport(storage.location, clips, texts, shards, total, time.monotonic() - started, tuple(faults))


def check_shards(audit: Audit) -> Iterator[tuple[int, list[Fault]]]:
    """Bytes and faults of each shard of a store, in order."""
    threads = max(usable_cores(), audit.storage.parallel_reads)
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for shard, faults in zip(audit.shards, pool.map(partial(check_shard, audit), audit.shards)):
            yield audit.ledger.commits[shard].nbytes, faults


def _in_folder(folder: str, fault: Fault) -> Fault:
    return replace(fault, where=f"{folder}/{fault.where}" if folder else fault.where)


def check_shard(audit: Audit, shard: int) -> list[Fault]:
    """Compare a shard's files with the ledger; its rows are read one by one only if the files differ.

    A file that matches its commit need not hold every committed row: two writers that both believed they owned the
    shard may have replaced each other's files, each with a commit of its own.
    """
    faults = _differences(audit, shard) or _absent_rows(audit, shard)
    while faults and audit.is_outdated(shard):
        audit = audit_store(audit.storage)
        faults = _differences(audit, shard) or _absent_rows(audit, shard) if shard in audit.ledger.commits else []
    if not faults:
        return []
    bad = bad_rows(audit, shard)
    # If every row reads back, the damage is between the rows; other tools may fail on it all the same.
    return [Fault(f.where, f.what, tuple(bad or audit.clips_of(shard)), shard) for f in faults]


def _differences(audit: Audit, shard: int) -> list[Fault]:
    committed = audit.ledger.commits[shard].files
    versions = [committed, *audit.ledger.announced.get(shard, [])]
    files = audit.ledger.files_in(audit.storage, shard)
    faults: list[Fault] = []
    for name in audit.format.file_names(audit.spec, shard):  # names in the ledger might lead elsewhere
        if name not in committed:
            faults.append(Fault(name, "is not in the ledger", shard=shard))
            continue
        try:
            actual = files.size_and_crc(name)
        except OSError as error:
            faults.append(Fault(name, f"cannot be read: {error.strerror}", shard=shard))
            continue
        if all(actual != version.get(name) for version in versions):
            size = committed[name][0]
            if actual[0] != size:
                what = f"has {actual[0]} bytes; {size} were committed"
            else:
                what = "has bytes that differ from those committed"
            faults.append(Fault(name, what, shard=shard))
    return faults


def _absent_rows(audit: Audit, shard: int) -> list[Fault]:
    """Look every committed row up in the index of the shard's files."""
    names, spec = audit.clips_of(shard), audit.spec
    try:
        opened = audit.format.open(audit.ledger.files_in(audit.storage, shard), spec, shard)
        for name in names:
            for array in spec.arrays:
                opened.find_row(array, audit.ledger.clips[name].clip(name).row % spec.shard)
    except (DamagedStore, OSError) as error:
        where = audit.format.file_names(spec, shard)[0]
        return [Fault(where, f"does not hold every committed row: {error}", shard=shard)]
    return []


def bad_rows(audit: Audit, shard: int) -> list[str]:
    """The committed ids of a shard whose bytes differ from those that were committed."""
    names, spec = audit.clips_of(shard), audit.spec
    try:
        opened = audit.format.open(audit.ledger.files_in(audit.storage, shard), spec, shard)
    except DamagedStore:
        return names

    def is_intact(name: str) -> bool:
        record = audit.ledger.clips[name].clip(name)
        try:
            for array in spec.arrays:
                chunk = opened.find_row(array, record.row % spec.shard)
                if chunk.read_into(np.empty(row_bytes(array), np.uint8)) != record.checksums.get(array.name):
                    return False
        except (DamagedStore, OSError):
            return False
        return True

    return [name for name in names if not is_intact(name)]
