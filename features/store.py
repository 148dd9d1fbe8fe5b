"""The store: features of many clips, and what made them. A clip in it is whole or absent.

python -c "from features import open_store; print(open_store('stores/x').clip_ids)"
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np
import torch
from torch import Tensor

from features import lease
from features.committing import Target, commit_shard
from features.dtypes import row_bytes, stored, to_disk
from features.durable import disk_full_is_clear, holds, locked, make_folder
from features.encoding import check_names, dequantise, encode, reconstruction_error
from features.errors import AbsentClip, DamagedStore, FingerprintMismatch, StoreError
from features.formats import Format
from features.hdf5_store import Hdf5Format
from features.header import differences, header_path, make_header, parse_header, read_header, write_header
from features.ids import RowPlan, grow, ids_journal, read_plan, unseen
from features.journal import Position, files_from_json, require_intact
from features.ledger import ClipRecord, Ledger, drop, ledger_journal
from features.quarantine import Failure, QuarantineRecord, add_failures, quarantine_journal, read_quarantine
from features.reading import RowReader
from features.spec import ArraySpec, Fingerprint, PatchTokens, StoreSpec, TextStates
from features.zarr_store import ZarrFormat

_TOKENS = ("patches", "coarse", "states")  # the arrays that `read(dtype=...)` converts


@dataclass(frozen=True)
class ShardWork:
    """What is still to compute of one shard."""

    shard: int
    ids: tuple[str, ...]


FORMATS: Mapping[str, Format] = MappingProxyType({"zarr": ZarrFormat(), "hdf5": Hdf5Format()})


def format_named(name: str) -> Format:
    """The file format called `name`.

    Raises:
        StoreError: there is no such format.
    """
    if name not in FORMATS:
        raise StoreError(f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def create_store(
    path: Path | str, spec: StoreSpec, fingerprint: Fingerprint, ids: Sequence[str], format: str = "zarr"
) -> "Store":
    """Create a store with a row for each of `ids`, or open the one at `path` and add rows for ids that it lacks.

    Rows never move: row r belongs to shard r // spec.shard for ever.

    Raises:
        FingerprintMismatch: the store there was made by something else; the message names the differing fields.
        StoreError: an id is unsafe, or the store there is damaged.
    """
    root = Path(path)
    files = format_named(format)
    header = make_header(spec, fingerprint, format)
    unseen((), ids, spec.kind)  # refuse bad ids before anything is written
    with disk_full_is_clear(f"creating {root}"):
        make_folder(root)
        with locked(root / "growth.lock"):
            if not header_path(root).exists():
                for journal in (ids_journal(root), ledger_journal(root), quarantine_journal(root)):
                    journal.create()
                write_header(root, header)
            different = differences(read_header(root), header)
            if different:
                raise FingerprintMismatch(
                    f"store {root} was made by something else ({'; '.join(different)}; here: the store, there: what "
                    "was asked for); choose another store.path, or ask for what is there"
                )
            plan, contents = read_plan(root)
            require_intact(contents, ids_journal(root).path)
            fresh = unseen(plan.row_ids, ids, spec.kind)
            if fresh or any(not holds(root / name, entry) for name, entry in plan.files.items()):
                grow(root, fresh, files.metadata(header, spec, len(plan.row_ids) + len(fresh)))
    return open_store(root)


def open_store(path: Path | str, expect: Fingerprint | None = None) -> "Store":
    """Open the store at `path`.

    Raises:
        FingerprintMismatch: it was not made by `expect`; the message names the differing fields.
        StoreError: there is none, or what describes it is damaged; one line that says which file.
    """
    root = Path(path)
    spec, fingerprint, format_name = parse_header(read_header(root))
    if expect is not None and (different := fingerprint.differences(expect)):
        raise FingerprintMismatch(
            f"store {root} was made by something else than is expected ({'; '.join(different)}; here: the store, "
            "there: what is expected); use the store that fits, or encode again"
        )
    return Store(root, spec, fingerprint, format_named(format_name))


class Store:
    """An open store; make one with `open_store` or `create_store`. It can be sent to other processes.

    Attributes:
        path: its folder.
        spec: its shape.
        fingerprint: what made it.
        format: `zarr` or `hdf5`.
        planned_ids: the id of every row, in row order.
    """

    def __init__(self, path: Path, spec: StoreSpec, fingerprint: Fingerprint, files: Format) -> None:
        self.path = path
        self.spec = spec
        self.fingerprint = fingerprint
        self.format = files.name
        self._files = files
        self._journal = ledger_journal(path)
        self._row_bytes = sum(row_bytes(array) for array in spec.arrays)
        self._held: set[int] = set()
        self._plan = RowPlan()
        self._rows: dict[str, int] = {}
        self._ledger = Ledger()
        self._planned_to: Position | None = None
        self._committed_to: Position | None = None
        self._reader = RowReader(path, spec, files)
        self.refresh()

    def refresh(self) -> None:
        """See what other processes have committed or planned since.

        Raises:
            DamagedStore: a file that describes the store is damaged; the message names the line.
        """
        # The ledger first: ids are written before any of their clips can be committed.
        committed = self._journal.read(self._committed_to)
        require_intact(committed, self._journal.path)
        planned = ids_journal(self.path).read(self._planned_to)
        require_intact(planned, ids_journal(self.path).path)
        if planned.first == 0:
            self._plan = RowPlan()
        if committed.first == 0:
            self._ledger = Ledger()
        self._plan.add_all(planned)
        self._ledger.add_all(committed)
        self._planned_to, self._committed_to = planned.position, committed.position
        if planned.records:
            self._rows = {name: row for row, name in enumerate(self._plan.row_ids) if name is not None}
        for record in committed.records:
            # Of a commit alone, and its own files: a later one may have written the shard anew with fewer clips.
            clips = record.get("clips", ())
            held = sum(size for size, _ in files_from_json(record["files"]).values()) if clips else 0
            if len(clips) * self._row_bytes > held:
                raise DamagedStore(
                    f"{self.path}: store.json claims {self._row_bytes} bytes a row, but shard {record['shard']} has "
                    f"{held} bytes for {len(clips)} rows; this is not the store that was written"
                )
            for clip in clips:
                # A clip that was dropped since may have lost its row to a repair.
                current = self._ledger.clips.get(clip["id"])
                if current is not None and self._rows.get(clip["id"]) != current.row:
                    raise DamagedStore(
                        f"{self.path}: ids.jsonl and ledger.jsonl disagree about the row of clip {clip['id']!r}; "
                        f"run `python -m features repair {self.path}`"
                    )

    @property
    def planned_ids(self) -> tuple[str, ...]:
        """The id of every row, in row order."""
        return tuple(self._rows)

    @property
    def clip_ids(self) -> tuple[str, ...]:
        """The committed ids, in row order."""
        return tuple(name for name in self._rows if name in self._ledger.clips)

    @property
    def quarantine(self) -> Mapping[str, QuarantineRecord]:
        """The clips that could not be encoded, by id."""
        return MappingProxyType(read_quarantine(quarantine_journal(self.path), self._ledger.clips))

    @property
    def reconstruction_error(self) -> Mapping[str, float]:
        """Where tokens are stored in few bits: array -> the worst clip's root mean square error, over its own size."""
        worst: dict[str, float] = {}
        for errors in self._ledger.errors.values():
            for array, error in errors.items():
                worst[array] = max(error, worst.get(array, 0.0))
        return MappingProxyType(worst)

    @property
    def nbytes(self) -> int:
        """Bytes of the committed shards' files."""
        return sum(size for files in self._ledger.files.values() for size, _ in files.values())

    def missing(self) -> tuple[str, ...]:
        """The ids that are neither committed nor in quarantine."""
        quarantined = self.quarantine
        return tuple(name for name in self._rows if name not in self._ledger.clips and name not in quarantined)

    def missing_shards(self, retry_quarantined: bool = False) -> list[ShardWork]:
        """The shards that still have something to do, and the ids to compute in each."""
        skip = {} if retry_quarantined else self.quarantine
        work: dict[int, list[str]] = {}
        for name, row in self._rows.items():
            if name not in self._ledger.clips and name not in skip:
                work.setdefault(row // self.spec.shard, []).append(name)
        return [ShardWork(shard, tuple(ids)) for shard, ids in sorted(work.items())]

    # Reading

    def read(
        self,
        ids: Sequence[str],
        dtype: torch.dtype | None = None,
        out: PatchTokens | None = None,
        threads: int = 1,
    ) -> PatchTokens:
        """The patch tokens of `ids`, in that order; an id may come twice. Every checksum is checked.

        Args:
            ids: clips.
            dtype: of `patches` and `coarse`; the stored one by default. Asking for one multiplies by `scale`.
            out: buffers for the stored bytes (pinned ones, say) with at least len(ids) rows, as `buffers` makes them;
                what is returned are their first rows, so the next read into them changes it.
            threads: that read at the same time.

        Raises:
            AbsentClip: names the ids that were never committed.
            DamagedStore: names the clip whose bytes are not those that were committed.
        """
        if self.spec.kind != "patches":
            raise StoreError(f"store {self.path} holds {self.spec.kind} rows; expected patches: use read_text")
        return PatchTokens(**self._read(ids, dtype, out.tensors() if out else None, threads))

    def read_text(self, texts: Sequence[str], dtype: torch.dtype | None = None) -> TextStates:
        """The text network's states of `texts`, in that order; `dtype` of the states. Errors as in `read`."""
        if self.spec.kind != "text":
            raise StoreError(f"store {self.path} holds {self.spec.kind} rows; expected text: use read")
        return TextStates(**self._read(texts, dtype))

    def buffers(self, rows: int, pin: bool = False) -> PatchTokens:
        """Memory that `read(out=...)` can fill again and again; pinned for copies to a GPU if asked."""
        return PatchTokens(
            **{
                array.name: torch.empty(rows, *array.shape, dtype=stored(array.dtype).torch, pin_memory=pin)
                for array in self.spec.arrays
            }
        )

    def _read(
        self,
        ids: Sequence[str],
        dtype: torch.dtype | None = None,
        out: Mapping[str, Tensor] | None = None,
        threads: int = 1,
    ) -> dict[str, Tensor]:
        records = self._records(ids)
        tensors = {array.name: _buffer(array, len(ids), out) for array in self.spec.arrays}
        self._reader.read(ids, records, [(array, tensors[array.name]) for array in self.spec.arrays], threads)
        return tensors if dtype is None else _converted(tensors, dtype)

    def sources(self, ids: Sequence[str]) -> dict[str, str]:
        """Hash of what each of `ids` was encoded from. Errors as in `read`."""
        return {name: record.source for name, record in zip(ids, self._records(ids), strict=True)}

    def read_arrays(self, ids: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Every array by name, whatever the kind of the store, as `read` gives them."""
        return self._read(ids, dtype)

    def _records(self, ids: Sequence[str]) -> list[ClipRecord]:
        absent = [name for name in dict.fromkeys(ids) if name not in self._ledger.clips]
        if absent:
            raise AbsentClip(absent, f"store {self.path}")
        return [self._ledger.clips[name] for name in ids]

    # Writing

    @contextmanager
    def lease(self, shard: int) -> Iterator[tuple[str, ...]]:
        """Own `shard` while its clips are computed and written.

        Yields:
            The shard's ids that nobody has committed by now, quarantined ones among them.

        Raises:
            ShardOwned: another live process has it; the message names host and process.
        """
        with lease.hold(self.path, shard):
            self._held.add(shard)
            try:
                self.refresh()
                yield tuple(name for name in self._ids_of(shard) if name not in self._ledger.clips)
            finally:
                self._held.discard(shard)

    def write_shard(
        self,
        shard: int,
        rows: Mapping[str, Mapping[str, Tensor]],
        sources: Mapping[str, str],
        failures: Mapping[str, Failure] = MappingProxyType({}),
    ) -> None:
        """Commit clips of one shard; afterwards they are all there, or after any failure none of them is.

        Rows that the shard has already stay as they are, bit for bit.

        Args:
            shard: its number.
            rows: id -> one tensor an array, without the batch.
            sources: id -> hash of the video (or text) it came from.
            failures: the clips that could not be encoded; they go to quarantine.

        Raises:
            ShardOwned: another live process has the shard.
            StoreError: an id is not of this shard; a tensor is missing, of another shape, or holds NaN or infinity; the
                disk is full. The message names id and array.
        """
        if shard in self._held:
            self._write_owned(shard, rows, sources, failures)
        else:
            with self.lease(shard):
                self._write_owned(shard, rows, sources, failures)

    def _write_owned(
        self,
        shard: int,
        rows: Mapping[str, Mapping[str, Tensor]],
        sources: Mapping[str, str],
        failures: Mapping[str, Failure],
    ) -> None:
        self._check_ids(shard, rows, sources, failures)
        for name, tensors in rows.items():
            check_names(name, tensors, self.spec)
        with disk_full_is_clear(f"writing shard {shard} of {self.path}"):
            if rows:
                self._commit(shard, rows, sources)
            add_failures(quarantine_journal(self.path), failures)
        self.refresh()

    def _check_ids(
        self,
        shard: int,
        rows: Mapping[str, Mapping[str, Tensor]],
        sources: Mapping[str, str],
        failures: Mapping[str, Failure],
    ) -> None:
        for name in [*rows, *failures]:
            row = self._rows.get(name)
            if row is None or row // self.spec.shard != shard:
                where = "has no row" if row is None else f"belongs to shard {row // self.spec.shard}"
                raise StoreError(f"clip {name!r} {where} in {self.path}; expected an id of shard {shard}")
        for name in rows:
            if name in failures:
                raise StoreError(f"clip {name!r} is given as encoded and as failed; expected one of the two")
            if name not in sources:
                raise StoreError(f"clip {name!r} has no entry in sources; expected the hash of its video")
            if name in self._ledger.clips:
                raise StoreError(f"clip {name!r} is committed already in {self.path}; write only what missing() names")

    def rewrite_shard(self, shard: int, without: Sequence[str]) -> None:
        """Write a shard's files anew with its committed rows, all but the damaged ones named in `without`.

        Raises:
            ShardOwned: another live process has the shard.
        """
        with self.lease(shard), disk_full_is_clear(f"rewriting shard {shard} of {self.path}"):
            left = [name for name in self._committed_of(shard) if name not in without]
            if without:
                self._journal.append(drop(shard, without, emptied=not left))
                self.refresh()
            if left:
                self._commit(shard, {}, {})
            else:
                for name in self._files.files(self.spec, shard):
                    (self.path / name).unlink(missing_ok=True)
            self.refresh()

    def _committed_of(self, shard: int) -> list[str]:
        return [name for name in self._ids_of(shard) if name in self._ledger.clips]

    def _ids_of(self, shard: int) -> list[str]:
        names = self._plan.row_ids[shard * self.spec.shard : (shard + 1) * self.spec.shard]
        return [name for name in names if name is not None]

    def _commit(self, shard: int, new: Mapping[str, Mapping[str, Tensor]], sources: Mapping[str, str]) -> None:
        """Commit the shard's rows of before, as they are, and the `new` ones."""
        kept = self._committed_of(shard)
        rows = {name: self._rows[name] for name in sorted([*kept, *new], key=self._rows.__getitem__)}
        sources = {name: sources[name] if name in new else self._ledger.clips[name].source for name in rows}
        errors = dict(self._ledger.errors.get(shard, {}))
        target = Target(self.path, self.spec, self._files, self._journal, self.fingerprint.digest)
        for tensors in new.values():
            error = reconstruction_error(tensors, self.spec)
            if error is not None:
                errors["patches"] = max(error, errors.get("patches", 0.0))
        blocks = ((array, self._encoded(array, rows, new)) for array in self.spec.arrays)
        commit_shard(target, shard, rows, blocks, sources, errors)

    def _encoded(
        self, array: ArraySpec, rows: Mapping[str, int], new: Mapping[str, Mapping[str, Tensor]]
    ) -> Iterator[np.ndarray]:
        """One array's `rows` as they are written; new ones are checked, others read, one at a time."""
        for name in rows:
            if name in new:
                yield encode(name, new[name], array, self.spec)
            else:
                old = torch.empty(1, *array.shape, dtype=stored(array.dtype).torch)
                self._reader.read([name], self._records([name]), [(array, old)], threads=1)
                yield to_disk(old[0], array.dtype)

    def close(self) -> None:
        """Close the files that reading has opened."""
        self._reader.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, tuple[Path, Fingerprint]]:
        return open_store, (self.path, self.fingerprint)


def _buffer(array: ArraySpec, rows: int, out: Mapping[str, Tensor] | None) -> Tensor:
    """[rows, *row] to read into: new, or the first rows of what the caller gave."""
    dtype = stored(array.dtype).torch
    if out is None:
        return torch.empty(rows, *array.shape, dtype=dtype)
    given = out.get(array.name)
    wrong = given is None or given.dtype != dtype or given.shape[1:] != array.shape or len(given) < rows
    if given is None or wrong or not given.is_contiguous() or given.device.type != "cpu":
        found = "nothing" if given is None else f"{tuple(given.shape)} {given.dtype} on {given.device}"
        raise StoreError(
            f"out has {found} for {array.name}; expected at least {(rows, *array.shape)} {dtype}, contiguous, on the "
            "CPU: make it with Store.buffers"
        )
    return given[:rows]


def _converted(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tokens in `dtype`, multiplied by their scale where they were stored in few bits."""
    scale = tensors.pop("scale", None)
    converted = {name: tensor.to(dtype) if name in _TOKENS else tensor for name, tensor in tensors.items()}
    if scale is not None:
        converted["patches"] = dequantise(tensors["patches"], scale, dtype)
    return converted
