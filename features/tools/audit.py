"""A store's description, read as far as damage allows: its header, ids, ledger and quarantine, and their faults."""

from collections.abc import Sequence
from dataclasses import dataclass

from egopatch.features.formats.interface import Format
from egopatch.features.formats.registry import FORMATS
from egopatch.features.io.fields import Record
from egopatch.features.state.catalog import commit_mismatch
from egopatch.features.state.header import HEADER, StoreHeader, parse_header, read_header
from egopatch.features.state.ids import RowPlan, ids_journal
from egopatch.features.state.ledger import Commit, Ledger, ledger_journal
from egopatch.features.state.quarantine import quarantine_journal
from egopatch.features.storage.interface import Storage, file_matches
from egopatch.features.storage.journal import Position
from egopatch.features.values.errors import DamagedStore, StoreError
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
class Audit:
    """A store's description, as far as it can be read despite damage.

    Attributes:
        header_record: Header as JSON values, fields of later programs included; None where no copy of it is left.
        header: The same, parsed.
        row_ids: Row -> id, completed from the ledger where the journal of ids has lost some.
        ledger: State of the ledger by its intact lines.
        faults: Faults in the description.
        position: How far the ledger was read.
    """

    storage: Storage
    header_record: Record | None
    header: StoreHeader | None
    row_ids: tuple[str | None, ...]
    ledger: Ledger
    faults: tuple[Fault, ...]
    position: Position

    @property
    def spec(self) -> StoreSpec:
        """The spec in the header."""
        assert self.header is not None
        return self.header.spec

    @property
    def format(self) -> Format:
        """The file format in the header."""
        assert self.header is not None
        return FORMATS[self.header.format]

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
        NoStore: The store does not exist.
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
    record, header_faults = _header_record(storage, copy_is_sound=not metadata)
    if record is None and not committed.lines and not committed.lines_lost and not storage.exists(HEADER):
        read_header(storage)  # a store whose creation was interrupted before anything could be lost
    faults += header_faults + metadata
    row_ids, disputed = _completed(plan.row_ids, ledger)
    if disputed:
        faults.append(Fault(rows_journal.name, "disagrees with the ledger about the rows of clips", disputed))
    header = None if record is None else parse_header(record)
    lost = _uncommitted_with_files(storage, header, row_ids, ledger) if header and committed.faults else ()
    faults += [Fault(commits_journal.name, what, lost) for what in committed.faults]
    if header is not None:
        commits = [(line.number, line.entry) for line in committed.lines if isinstance(line.entry, Commit)]
        mismatches = [(number, reason) for number, entry in commits if (reason := commit_mismatch(entry, header))]
        faults += [Fault(commits_journal.name, f"line {number + 1} {reason}") for number, reason in mismatches]
    faults += [Fault(failures_journal.name, what) for what in failures_journal.read().faults]
    return Audit(storage, record, header, tuple(row_ids), ledger, tuple(faults), committed.position)


def _header_record(storage: Storage, copy_is_sound: bool) -> tuple[Record | None, list[Fault]]:
    """The header, or its copy where the header is damaged, and the faults; None where neither is reliable."""
    copies = [copy for known in FORMATS.values() if _is_sound(copy := known.header_copy(storage))]
    try:
        record = read_header(storage)
        parse_header(record)
    except StoreError as error:
        if not isinstance(error, DamagedStore) and storage.exists(HEADER):
            raise  # it may be as it should be
        return copies[0] if copies else None, [Fault(HEADER, str(error))]
    if copy_is_sound and copies and record not in copies:
        return None, [Fault(HEADER, "differs from its copy in the arrays' metadata")]
    return record, []


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
