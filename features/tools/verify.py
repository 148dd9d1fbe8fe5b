"""Reading back every committed clip, and naming those that differ from what was committed."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from egopatch.features.common.machine import usable_cores
from egopatch.features.formats.interface import Format
from egopatch.features.formats.registry import FORMATS, format_named
from egopatch.features.io.fields import Record
from egopatch.features.state.catalog import commit_mismatch
from egopatch.features.state.header import HEADER, StoreHeader, parse_header, read_header
from egopatch.features.state.ids import RowPlan, ids_journal
from egopatch.features.state.ledger import Commit, Ledger, ledger_journal
from egopatch.features.state.quarantine import quarantine_journal
from egopatch.features.storage.interface import Storage, file_matches
from egopatch.features.storage.journal import Position
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.text_substore import TEXT_FOLDER, substores
from egopatch.features.values.dtypes import row_bytes
from egopatch.features.values.errors import DamagedStore, OtherVersion, StoreError
from egopatch.features.values.location import Location
from egopatch.features.values.spec import StoreSpec


@dataclass(frozen=True)
class Fault:
    """One fault in a store.

    Attributes:
        where: File, relative to the store.
        what: The fault, in one line that continues the file's name.
        clips: Ids that the fault makes unreliable; empty where only the store's description is damaged.
        shard: Shard of the file, if the file belongs to one.
    """

    where: str
    what: str
    clips: tuple[str, ...] = ()
    shard: int | None = None


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
    def bad_clips(self) -> tuple[str, ...]:
        """Ids that the faults name, each once."""
        return tuple(dict.fromkeys(name for fault in self.faults for name in fault.clips))


@dataclass(frozen=True)
class Audit:
    """A store's description, as far as it can be read despite damage.

    Attributes:
        header: Header as JSON values; None where no copy of it is left.
        row_ids: Row -> id, completed from the ledger where the journal of ids has lost some.
        ledger: State of the ledger by its intact lines.
        faults: Faults in the description.
        position: How far the ledger was read.
    """

    storage: Storage
    header: Record | None
    row_ids: tuple[str | None, ...]
    ledger: Ledger
    faults: tuple[Fault, ...]
    position: Position

    @property
    def spec(self) -> StoreSpec:
        """The spec in the header."""
        assert self.header is not None
        return parse_header(self.header).spec

    @property
    def format(self) -> Format:
        """The file format in the header."""
        assert self.header is not None
        return format_named(self.header["format"])

    @property
    def shards(self) -> list[int]:
        """Numbers of the committed shards; empty without a header, which describes the layout of their files."""
        return [] if self.header is None else sorted(self.ledger.commits)

    @property
    def nbytes(self) -> int:
        """Bytes in the committed shards' files."""
        return sum(self.ledger.commits[shard].nbytes for shard in self.shards)

    def is_outdated(self, shard: int) -> bool:
        """Whether the ledger has new lines about the shard, so that its former files may be gone."""
        added = ledger_journal(self.storage).read(self.position, shard)
        return any(line.entry.shard == shard for line in added.lines)

    def clips_of(self, shard: int) -> list[str]:
        """The committed ids of a shard, in row order."""
        size = self.spec.shard
        names = self.row_ids[shard * size : (shard + 1) * size]
        return [name for name in names if name is not None and name in self.ledger.clips]


def audit_store(storage: Storage) -> Audit:
    """Read the store's description; all damage to it becomes faults.

    Raises:
        OtherVersion: Another version of this program wrote the store.
        StoreError: The store does not exist.
    """
    commits_journal, rows_journal = ledger_journal(storage), ids_journal(storage)
    failures_journal = quarantine_journal(storage)
    if not storage.exists(HEADER) and not storage.exists(commits_journal.name):
        read_header(storage)
    faults: list[Fault] = []
    ledger, plan = Ledger(), RowPlan()
    committed = commits_journal.read()  # before the ids, which are written before their clips
    planned = rows_journal.read()
    ledger.add_all(committed)
    plan.add_all(planned)
    faults += [Fault(rows_journal.name, what) for what in planned.faults]
    metadata = [
        Fault(name, "differs from what was written")
        for name in plan.files
        if not any(file_matches(storage, name, files[name]) for files in (plan.files, *plan.announced) if name in files)
    ]
    header = _header(storage, faults, copy_is_sound=not metadata)
    faults += metadata
    row_ids, disputed = _completed(plan.row_ids, ledger)
    if disputed:
        faults.append(Fault(rows_journal.name, "disagrees with the ledger about the rows of clips", disputed))
    parsed = None if header is None else parse_header(header)
    lost = _uncommitted_with_files(storage, parsed, row_ids, ledger) if parsed and committed.faults else ()
    faults += [Fault(commits_journal.name, what, lost) for what in committed.faults]
    if parsed is not None:
        commits = [(line.number, line.entry) for line in committed.lines if isinstance(line.entry, Commit)]
        mismatches = [(number, reason) for number, entry in commits if (reason := commit_mismatch(entry, parsed))]
        faults += [Fault(commits_journal.name, f"line {number + 1} {reason}") for number, reason in mismatches]
    faults += [Fault(failures_journal.name, what) for what in failures_journal.read().faults]
    return Audit(storage, header, tuple(row_ids), ledger, tuple(faults), committed.position)


def verify(path: Location | str, on_bytes: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read all committed rows and compare them with the ledger; also check the store's description for consistency.

    Args:
        path: Location of the store; its text substore is verified too.
        on_bytes: Called with the bytes read so far and the bytes to read in all.

    Raises:
        OtherVersion: Another version of this program wrote the store.
        StoreError: The store does not exist.
    """
    storage, started = storage_at(path), time.monotonic()
    audits = {"": audit_store(storage)}
    faults = list(audits[""].faults)
    for folder in substores(storage)[1:]:
        try:
            audits[folder] = audit_store(storage_at(storage.location / folder))
            faults += [_in_folder(folder, fault) for fault in audits[folder].faults]
        except OtherVersion:
            raise
        except StoreError as error:
            faults.append(Fault(TEXT_FOLDER, str(error)))
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


def _header(storage: Storage, faults: list[Fault], copy_is_sound: bool) -> Record | None:
    """The header, or its copy where the header is damaged; None where neither is reliable."""
    copies = [copy for known in FORMATS.values() if _is_sound(copy := known.header_copy(storage))]
    try:
        record = read_header(storage)
        parse_header(record)
    except StoreError as error:
        if not isinstance(error, DamagedStore) and storage.exists(HEADER):
            raise  # it may be as it should be
        faults.append(Fault(HEADER, str(error)))
        return copies[0] if copies else None
    if copy_is_sound and copies and record not in copies:
        faults.append(Fault(HEADER, "differs from its copy in the arrays' metadata"))
        return None
    return record


def _is_sound(record: Record | None) -> bool:
    try:
        parse_header(record or {})
    except StoreError:
        return False
    return True


def _completed(row_ids: Sequence[str | None], ledger: Ledger) -> tuple[list[str | None], tuple[str, ...]]:
    """Row -> id, with the ledger's id wherever the journal of ids disagrees; also returns those ids.

    A line that the journal has lost moves all ids after it, so that committed ids may be in other rows.
    """
    rows = {name: commit.clip(name).row for name, commit in ledger.clips.items()}
    completed = [None if name is None or rows.get(name, row) != row else name for row, name in enumerate(row_ids)]
    completed += [None] * (max(rows.values(), default=-1) + 1 - len(completed))
    disputed = dict.fromkeys(name for row, name in enumerate(row_ids) if name is not None and completed[row] is None)
    for name, row in rows.items():
        if completed[row] != name:
            completed[row] = name
            disputed[name] = None
    return completed, tuple(disputed)


def _uncommitted_with_files(
    storage: Storage, header: StoreHeader, row_ids: Sequence[str | None], ledger: Ledger
) -> tuple[str, ...]:
    """Ids that no intact line commits, in shards that have files: a damaged ledger may have lost their commits."""
    spec, file_format = header.spec, FORMATS[header.format]
    uncommitted = {row: clip for row, clip in enumerate(row_ids) if clip is not None and clip not in ledger.clips}
    if storage.in_place:
        shards = sorted({row // spec.shard for row in uncommitted})
        written = {shard for shard in shards if all(map(storage.exists, file_format.file_names(spec, shard)))}
    else:
        written = set(storage.write_ids_by_shard())
    return tuple(clip for row, clip in uncommitted.items() if row // spec.shard in written)
