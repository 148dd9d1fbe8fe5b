"""The current contents of a store: the rows planned by the journal of ids, and the clips committed by the ledger."""

import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from egopatch.features.state.header import StoreHeader
from egopatch.features.state.ids import RowPlan, ids_journal
from egopatch.features.state.ledger import ClipRecord, Commit, Entry, Ledger, RowVersion, ledger_journal
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.journal import Contents, Position, require_intact
from egopatch.features.values.dtypes import spec_row_bytes
from egopatch.features.values.errors import AbsentClip, DamagedStore, require_ids

T = TypeVar("T")


def commit_mismatch(commit: Commit, header: StoreHeader) -> str | None:
    """The reason why a commit cannot belong to a store of this header, whatever its checksums; None where it can."""
    spec = header.spec
    row_bytes = spec_row_bytes(spec)
    first = commit.shard * spec.shard
    for name, row in (commit.ids[0], commit.rows[0]), (commit.ids[-1], commit.rows[-1]):  # rows rise
        if not first <= row < first + spec.shard:
            return f"places clip {name!r} in row {row}, outside of shard {commit.shard}"
    size = sum(nbytes for nbytes, _ in commit.files.values())
    fits = spec.codec != "none" or len(commit.ids) * row_bytes <= size
    if commit.row_bytes != row_bytes or not fits:
        return f"committed {len(commit.ids)} rows in {size} bytes, but store.json claims {row_bytes} bytes a row"
    if commit.fingerprint != header.fingerprint.digest:
        return "committed clips whose fingerprint differs from the store's"
    return None


class Catalog:
    """One reader's view of a store; `refresh` brings it up to date.

    Attributes:
        root: Location of the store, for messages.
        rows: Id -> row, for every id that has a row.
        ledger: Committed clips and files.
        row_bytes: Bytes in one row of every array together, before compression.
        position: How far the ledger has been read.
        lock: Held while the catalog changes, and by readers that need several of its parts to belong together.

    Raises:
        DamagedStore: As in `refresh`.
    """

    def __init__(self, storage: Storage, header: StoreHeader) -> None:
        self.storage = storage
        self.root = storage.location
        self.spec = header.spec
        self.header = header
        self.rows: dict[str, int] = {}
        self.ledger = Ledger()
        self.row_bytes = spec_row_bytes(header.spec)
        self._plan = RowPlan()
        self._planned_to: Position | None = None
        self.position: Position | None = None
        self.lock = threading.RLock()
        self.refresh()

    def refresh(self, shard: int | None = None) -> None:
        """Read what any process has committed or planned since; with a `shard`, at least the commits of that shard.

        Raises:
            DamagedStore: A file that describes the store is damaged; the message names the line.
        """
        with self.lock:
            self._read(shard)
            # Rows that are being replaced are absent from the ledger while their files change. A writer that was killed
            # meanwhile holds no lock any more: its rows are absent until they are encoded again.
            abandoned: set[int] = set()
            # What is read after a wait may say that the next writer has begun to replace these rows, or others.
            while waiting := self.ledger.replacing - abandoned:
                replacing, before = min(waiting), self.position
                self.storage.wait_for_commit(replacing)
                self._read(replacing)
                if self.position == before:
                    abandoned.add(replacing)

    def _read(self, shard: int | None) -> None:
        # The ledger is read first: ids are written before any of their clips can be committed.
        committed = ledger_journal(self.storage).read(self.position, shard)
        require_intact(committed, self.storage.full_location)
        planned = ids_journal(self.storage).read(self._planned_to)
        require_intact(planned, self.storage.full_location)
        if planned.from_start:
            self._plan = RowPlan()
        self._plan.add_all(planned)
        ledger = Ledger() if committed.from_start else self.ledger
        ledger.add_all(committed)
        self.ledger = ledger  # complete before other threads see it
        self._planned_to = planned.position
        if planned.lines:
            self.rows = {name: row for row, name in enumerate(self._plan.row_ids) if name is not None}
        self._check(committed)
        self.position = committed.position  # set last, so that a refused entry is refused again

    def _check(self, committed: Contents[Entry]) -> None:
        for line in committed.lines:
            entry = line.entry
            if not isinstance(entry, Commit):
                continue
            if reason := commit_mismatch(entry, self.header):
                raise DamagedStore(
                    f"{self.root}: ledger.jsonl line {line.number + 1} {reason}; the store's store.json was lost or "
                    "replaced: restore the original"
                )
            planned = tuple(map(self.rows.get, entry.ids))
            for name, row in zip(entry.ids, planned, strict=True) if planned != entry.rows else ():
                # A clip that was dropped later may have lost its row in a repair.
                current = self.ledger.clips.get(name)
                if current is not None and current.clip(name).row != row:
                    raise DamagedStore(
                        f"{self.root}: ids.jsonl and ledger.jsonl line {line.number + 1} disagree about the row of "
                        f"clip {name!r}; run `egopatch features repair {shlex.quote(str(self.root))}`"
                    )

    @property
    def compression_ratio(self) -> float:
        """As `Store.compression_ratio`."""
        nbytes = self.ledger.nbytes
        return len(self.ledger.clips) * self.row_bytes / nbytes if nbytes else 1.0

    def shard_of(self, row: int) -> int:
        """The shard of `row`, which never changes."""
        return row // self.spec.shard

    def ids_of(self, shard: int) -> list[str]:
        """All ids of a shard, in row order."""
        names = self._plan.row_ids[shard * self.spec.shard : (shard + 1) * self.spec.shard]
        return [name for name in names if name is not None]

    def committed_of(self, shard: int) -> list[str]:
        """The committed ids of a shard, in row order."""
        return [name for name in self.ids_of(shard) if name in self.ledger.clips]

    def clip_records(self, ids: Sequence[str]) -> list[ClipRecord]:
        """The ledger's record of each of `ids`.

        Raises:
            AbsentClip: Some of them were never committed; the message names them.
            TypeError: `ids` holds no ids, or is one id instead of a list.
        """
        require_ids(ids)
        if wrong := [name for name in ids if not isinstance(name, str)]:
            raise TypeError(f"ids holds {wrong[0]!r:.60}; expected ids of clips; clip_ids lists them")
        commits = [self.ledger.clips.get(name) for name in ids]
        if None in commits:
            with self.lock:  # a thread that refreshes removes a row before it reads the one that replaces it
                commits = [self.ledger.clips.get(name) for name in ids]
        pairs = list(zip(ids, commits, strict=True))
        if absent := [name for name, commit in pairs if commit is None]:
            raise AbsentClip(list(dict.fromkeys(absent)), f"store {self.root}")
        return [commit.clip(name) for name, commit in pairs if commit is not None]

    def read_unchanged(self, ids: Sequence[str], read: Callable[[], T]) -> tuple[T, dict[str, RowVersion]]:
        """What `read` returns of the clips `ids`, and the version of each one's row, both of the same commits.

        `read` is called again if another process has replaced or removed a row meanwhile. Errors are those of `read`.
        """
        while True:
            versions = self.ledger.versions(ids)
            result = read()
            # Else another process has replaced or removed a row, or another thread is reading what replaced it.
            if versions.keys() >= set(ids) and self.ledger.versions(ids) == versions:
                return result, versions

    def unchanged(self, versions: Mapping[str, RowVersion]) -> list[str]:
        """The ids in `versions` whose row is still the same."""
        now = self.ledger.versions(versions)
        return [name for name, version in versions.items() if now.get(name) == version]
