"""Does every committed clip read back bit for bit? And if not, which ones do not?"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from egopatch.features.formats.interface import Format
from egopatch.features.formats.registry import FORMATS, format_named
from egopatch.features.io.fields import Record
from egopatch.features.state.catalog import misfit
from egopatch.features.state.header import HEADER, parse_header, read_header
from egopatch.features.state.ids import RowPlan, ids_journal
from egopatch.features.state.ledger import Commit, Ledger, ledger_journal
from egopatch.features.state.quarantine import quarantine_journal
from egopatch.features.storage.interface import Files, Storage, holds
from egopatch.features.storage.journal import Position
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.text_substore import TEXT, halves
from egopatch.features.values.dtypes import row_bytes
from egopatch.features.values.errors import DamagedStore, OtherVersion, StoreError
from egopatch.features.values.location import Location, locate
from egopatch.features.values.spec import Fingerprint, StoreSpec


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        where: file, relative to the store.
        what: in one line.
        clips: the ids that cannot be trusted because of it; empty where only the description of the store is damaged.
        shard: the shard that it lies in, if it lies in one.
    """

    where: str
    what: str
    clips: tuple[str, ...] = ()
    shard: int | None = None


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        path: the store.
        clips: how many are committed.
        shards: how many were read.
        nbytes: that were read.
        seconds: that it took.
        faults: everything that is wrong.
    """

    path: Location
    clips: int
    shards: int
    nbytes: int
    seconds: float
    faults: tuple[Fault, ...]

    @property
    def ok(self) -> bool:
        """True where nothing is wrong."""
        return not self.faults

    @property
    def bad_clips(self) -> tuple[str, ...]:
        """Every id that a fault names, once."""
        return tuple(dict.fromkeys(name for fault in self.faults for name in fault.clips))


@dataclass(frozen=True)
class Inspection:
    """A store's description as far as it can be read, whatever is damaged.

    Attributes:
        storage: where it lies.
        header: None where no copy of it is left.
        row_ids: row -> id, completed from the ledger where the file of ids has lost some.
        ledger: what its intact lines say.
        faults: what is wrong with the description.
        position: how far the ledger was read.
    """

    storage: Storage
    header: Record | None
    row_ids: tuple[str | None, ...]
    ledger: Ledger
    faults: tuple[Fault, ...]
    position: Position

    @property
    def spec(self) -> StoreSpec:
        """The shape that the header gives."""
        assert self.header is not None
        return parse_header(self.header).spec

    @property
    def format(self) -> Format:
        """The file format that the header names."""
        assert self.header is not None
        return format_named(self.header["format"])

    @property
    def shards(self) -> list[int]:
        """The numbers of the committed shards; none where nothing says how they lie in files."""
        return [] if self.header is None else sorted(self.ledger.files)

    @property
    def nbytes(self) -> int:
        """Bytes of the committed shards' files."""
        return sum(map(self.size_of, self.shards))

    def size_of(self, shard: int) -> int:
        """Bytes of the files of `shard`."""
        return sum(size for size, _ in self.ledger.files[shard].values())

    def files_of(self, shard: int) -> Files:
        """The files of `shard`."""
        return self.storage.shard_files(shard, self.ledger.attempts.get(shard, ""))

    def catch_up(self, shard: int) -> bool:
        """Whether somebody has committed the shard anew since, so that its former files may be gone."""
        added = ledger_journal(self.storage).read(self.position, shard)
        self.ledger.add_all(added)
        return any(isinstance(line.entry, Commit) and line.entry.shard == shard for line in added.lines)

    def clips_of(self, shard: int) -> list[str]:
        """The committed ids of a shard, in row order."""
        size = self.spec.shard
        names = self.row_ids[shard * size : (shard + 1) * size]
        return [name for name in names if name is not None and name in self.ledger.clips]


def inspect(storage: Storage) -> Inspection:
    """Read the store's description; every damage to it becomes a fault.

    Raises:
        OtherVersion: another version of this program wrote the store.
        StoreError: there is no store at all.
    """
    ledger_of, ids_of, quarantine = ledger_journal(storage), ids_journal(storage), quarantine_journal(storage)
    if not storage.exists(HEADER) and not storage.exists(ledger_of.name):
        read_header(storage)
    faults: list[Fault] = []
    ledger, plan = Ledger(), RowPlan()
    committed = ledger_of.read()  # before the ids, which are written before their clips
    planned = ids_of.read()
    ledger.add_all(committed)
    plan.add_all(planned)
    faults += [Fault(ids_of.name, what) for what in planned.faults]
    metadata = [
        Fault(name, "is not what was written")
        for name in plan.files
        if not any(holds(storage, name, files[name]) for files in (plan.files, *plan.announced) if name in files)
    ]
    header = _header(storage, faults, copy_is_sound=not metadata)
    faults += metadata
    row_ids, disputed = _completed(plan.row_ids, ledger)
    if disputed:
        faults.append(Fault("ids.jsonl", "disagrees with the ledger about the rows of clips", disputed))
    if header is not None and ledger.fingerprints - {Fingerprint(header["fingerprint"]).digest}:
        faults.append(Fault("ledger.jsonl", "holds clips of another fingerprint than the store's"))
    uncounted = _uncommitted_with_files(storage, header, row_ids, ledger) if committed.faults else ()
    faults += [Fault(ledger_of.name, what, uncounted) for what in committed.faults]
    if header is not None:
        spec = parse_header(header).spec
        commits = [(line.number, line.entry) for line in committed.lines if isinstance(line.entry, Commit)]
        strange = [(number, reason) for number, entry in commits if (reason := misfit(entry, spec))]
        faults += [Fault(ledger_of.name, f"line {number + 1} {reason}") for number, reason in strange]
    faults += [Fault(quarantine.name, what) for what in quarantine.read().faults]
    return Inspection(storage, header, tuple(row_ids), ledger, tuple(faults), committed.position)


def verify(
    path: Location | str, workers: int | None = None, on_bytes: Callable[[int, int], None] | None = None
) -> Report:
    """Read everything that was committed and compare it with the ledger, and the store's description with itself.

    Args:
        path: the store; the text states inside it are verified too.
        workers: threads; by default as many as there are processors, or as object storage is worth.
        on_bytes: called with the bytes read so far and in all.

    Raises:
        OtherVersion: another version of this program wrote the store.
        StoreError: there is no store at `path`.
    """
    storage, started = storage_at(locate(path)), time.monotonic()
    found = {"": inspect(storage)}
    faults = list(found[""].faults)
    for half in halves(storage)[1:]:
        try:
            found[half] = inspect(storage.inside(half))
            faults += [_inside(half, fault) for fault in found[half].faults]
        except OtherVersion:
            raise
        except StoreError as error:
            faults.append(Fault(TEXT, str(error)))
    shards = sum(len(inspected.shards) for inspected in found.values())
    total = sum(inspected.nbytes for inspected in found.values())
    done = 0
    for half, inspected in found.items():
        for size, shard_faults in check_shards(inspected, workers):
            faults += [_inside(half, fault) for fault in shard_faults]
            done += size
            if on_bytes is not None:
                on_bytes(done, total)
    return Report(
        storage.location, len(found[""].ledger.clips), shards, total, time.monotonic() - started, tuple(faults)
    )


def check_shards(found: Inspection, workers: int | None = None) -> Iterator[tuple[int, list[Fault]]]:
    """Bytes and faults of each of a store's shards, in order."""
    workers = workers or max(os.cpu_count() or 1, found.storage.parallel)
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        yield from zip(map(found.size_of, found.shards), pool.map(partial(check_shard, found), found.shards))


def _inside(half: str, fault: Fault) -> Fault:
    return replace(fault, where=f"{half}/{fault.where}" if half else fault.where)


def check_shard(found: Inspection, shard: int) -> list[Fault]:
    """Compare a shard's files with the ledger; only where they differ are its rows looked at one by one."""
    faults = _differences(found, shard)
    if faults and found.catch_up(shard):
        faults = _differences(found, shard)
    if not faults:
        return []
    bad = bad_rows(found, shard)
    # Where every row still reads back, what is damaged lies around them; other tools may trip over it all the same.
    return [Fault(f.where, f.what, tuple(bad or found.clips_of(shard)), shard) for f in faults]


def _differences(found: Inspection, shard: int) -> list[Fault]:
    versions = [found.ledger.files[shard], *found.ledger.announced.get(shard, [])]
    files = found.files_of(shard)
    faults: list[Fault] = []
    for name in found.format.files(found.spec, shard):  # not the ledger's own names, which might lead elsewhere
        if name not in versions[0]:
            faults.append(Fault(name, "is not in the ledger", shard=shard))
            continue
        try:
            actual = files.sum_of(name)
        except OSError as error:
            faults.append(Fault(name, f"cannot be read: {error.strerror}", shard=shard))
            continue
        if all(actual != version.get(name) for version in versions):
            size = found.ledger.files[shard][name][0]
            what = f"{actual[0]} bytes where {size}" if actual[0] != size else "other bytes than those that"
            faults.append(Fault(name, f"has {what} were committed", shard=shard))
    return faults


def bad_rows(found: Inspection, shard: int) -> list[str]:
    """The committed ids of a shard of which some bytes are not those that were committed."""
    names = found.clips_of(shard)
    spec = found.spec
    try:
        opened = found.format.open(found.files_of(shard), spec, shard)
    except DamagedStore:
        return names
    bad = []
    for name in names:
        record = found.ledger.clips[name].clip(name)
        for array in spec.arrays:
            row = np.empty(row_bytes(array), np.uint8)
            try:
                chunk = opened.find(array, record.row % spec.shard)
                intact = chunk.read_into(row) == record.checksums.get(array.name)
            except (DamagedStore, OSError):
                intact = False
            if not intact:
                bad.append(name)
                break
    return bad


def _header(storage: Storage, faults: list[Fault], copy_is_sound: bool) -> Record | None:
    """The header, or its copy where it is damaged; None where neither can be trusted."""
    copies = [copy for files in FORMATS.values() if _is_sound(copy := files.header_of(storage))]
    try:
        header = read_header(storage)
        described = parse_header(header)
        format_named(described.format, described.spec.codec)
    except OtherVersion:
        raise
    except StoreError as error:
        faults.append(Fault(HEADER, str(error)))
        return copies[0] if copies else None
    if copy_is_sound and copies and header not in copies:
        faults.append(Fault(HEADER, "says something else than the copy in the arrays' metadata"))
        return None
    return header


def _is_sound(header: Record | None) -> bool:
    try:
        described = parse_header(header or {})
        format_named(described.format, described.spec.codec)
    except StoreError:
        return False
    return True


def _completed(row_ids: Sequence[str | None], ledger: Ledger) -> tuple[list[str | None], tuple[str, ...]]:
    """Row -> id with the ledger's word wherever the file of ids says otherwise, and the ids where it did."""
    completed = list(row_ids)
    disputed = []
    for name, commit in ledger.clips.items():
        row = commit.clip(name).row
        completed += [None] * (row + 1 - len(completed))
        if completed[row] != name:
            completed[row] = name
            disputed.append(name)
    return completed, tuple(disputed)


def _uncommitted_with_files(
    storage: Storage, header: Record | None, row_ids: Sequence[str | None], ledger: Ledger
) -> tuple[str, ...]:
    """Ids whose shard has files but which no intact line commits: what a damaged ledger may have lost."""
    if header is None:
        return ()
    described = parse_header(header)
    spec, files = described.spec, FORMATS[described.format]
    waiting = {row: clip for row, clip in enumerate(row_ids) if clip is not None and clip not in ledger.clips}
    return tuple(
        clip
        for row, clip in waiting.items()
        if _has_files(storage, row // spec.shard, files.files(spec, row // spec.shard))
    )


def _has_files(storage: Storage, shard: int, names: Sequence[str]) -> bool:
    return bool(storage.attempts(shard)) if not storage.in_place else all(map(storage.exists, names))
