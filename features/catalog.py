"""What a store holds by now: the rows that the file of ids plans, and the clips that the ledger has committed."""

from collections.abc import Sequence
from pathlib import Path

from features.dtypes import row_bytes
from features.errors import AbsentClip, DamagedStore
from features.ids import RowPlan, ids_journal
from features.journal import Contents, Position, require_intact
from features.ledger import ClipRecord, Commit, Entry, Ledger, ledger_journal
from features.spec import StoreSpec


class Catalog:
    """One reader's view of the store at `root`; `refresh` brings it up to date.

    Attributes:
        root: the store's folder.
        spec: its shape.
        rows: id -> row, of every id that has one.
        ledger: what is committed.
        row_bytes: of one row of every array, before compression.

    Raises:
        DamagedStore: as `refresh`.
    """

    def __init__(self, root: Path, spec: StoreSpec) -> None:
        self.root = root
        self.spec = spec
        self.rows: dict[str, int] = {}
        self.ledger = Ledger()
        self.row_bytes = sum(row_bytes(array) for array in spec.arrays)
        self._plan = RowPlan()
        self._planned_to: Position | None = None
        self._committed_to: Position | None = None
        self.refresh()

    def refresh(self) -> None:
        """See what any process has committed or planned since.

        Raises:
            DamagedStore: a file that describes the store is damaged; the message names the line.
        """
        # The ledger first: ids are written before any of their clips can be committed.
        ledger, ids = ledger_journal(self.root), ids_journal(self.root)
        committed = ledger.read(self._committed_to)
        require_intact(committed, ledger.path)
        planned = ids.read(self._planned_to)
        require_intact(planned, ids.path)
        if planned.first == 0:
            self._plan = RowPlan()
        if committed.first == 0:
            self.ledger = Ledger()
        self._plan.add_all(planned)
        self.ledger.add_all(committed)
        self._planned_to, self._committed_to = planned.position, committed.position
        if planned.lines:
            self.rows = {name: row for row, name in enumerate(self._plan.row_ids) if name is not None}
        self._check(committed)

    def _check(self, committed: Contents[Entry]) -> None:
        for line in committed.lines:
            entry = line.entry
            if not isinstance(entry, Commit):
                continue
            if self.row_bytes != (entry.row_bytes or self.row_bytes) or not self._has_room(entry):
                held = sum(size for size, _ in entry.files.values())
                raise DamagedStore(
                    f"{self.root}: store.json claims {self.row_bytes} bytes a row, but ledger.jsonl line "
                    f"{line.number + 1} committed {len(entry.clips)} rows in {held} bytes; this is not the store that "
                    "was written: put its store.json back"
                )
            for name, clip in entry.clips.items():
                # A clip that was dropped since may have lost its row to a repair.
                current = self.ledger.clips.get(name)
                in_shard = clip.row // self.spec.shard == entry.shard
                if not in_shard or (current is not None and self.rows.get(name) != current.row):
                    raise DamagedStore(
                        f"{self.root}: ids.jsonl and ledger.jsonl line {line.number + 1} disagree about the row of "
                        f"clip {name!r}; run `python -m features repair {self.root}`"
                    )

    def _has_room(self, entry: Commit) -> bool:
        return self.spec.codec != "none" or len(entry.clips) * self.row_bytes <= sum(
            size for size, _ in entry.files.values()
        )

    def shard_of(self, row: int) -> int:
        """The shard that `row` lies in, for ever."""
        return row // self.spec.shard

    def ids_of(self, shard: int) -> list[str]:
        """Every id of a shard, in row order."""
        names = self._plan.row_ids[shard * self.spec.shard : (shard + 1) * self.spec.shard]
        return [name for name in names if name is not None]

    def committed_of(self, shard: int) -> list[str]:
        """The committed ids of a shard, in row order."""
        return [name for name in self.ids_of(shard) if name in self.ledger.clips]

    def records(self, ids: Sequence[str]) -> list[ClipRecord]:
        """What the ledger says of each of `ids`.

        Raises:
            AbsentClip: names those that were never committed.
        """
        absent = [name for name in dict.fromkeys(ids) if name not in self.ledger.clips]
        if absent:
            raise AbsentClip(absent, f"store {self.root}")
        return [self.ledger.clips[name] for name in ids]
