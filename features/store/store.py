"""The store: features of many clips, and what made them. A clip in it is whole or absent.

python -c "from egopatch.features import open_store; print(open_store('stores/x').clip_ids)"
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType, TracebackType

import torch
from torch import Tensor

from egopatch.features.formats.interface import Format
from egopatch.features.formats.registry import format_named
from egopatch.features.io.fields import Record
from egopatch.features.io.files import disk_full_is_clear
from egopatch.features.state.catalog import Catalog
from egopatch.features.state.header import HEADER, Description, create_header, make_header, parse_header, read_header
from egopatch.features.state.ids import RowPlan, grow, ids_journal, unseen
from egopatch.features.state.ledger import ledger_journal
from egopatch.features.state.quarantine import Failure, Quarantine, QuarantineRecord, quarantine_journal
from egopatch.features.storage.interface import Storage, holds
from egopatch.features.storage.journal import require_intact
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.reader import Reader, make_buffers
from egopatch.features.store.writer import Rows, Writer
from egopatch.features.values.errors import BadLocation, FingerprintMismatch, Overtaken, StoreError
from egopatch.features.values.location import Location, locate
from egopatch.features.values.spec import Fingerprint, PatchTokens, StoreSpec, TextStates


@dataclass(frozen=True)
class ShardWork:
    """What is still to compute of one shard."""

    shard: int
    ids: tuple[str, ...]


def create_store(
    path: Location | str, spec: StoreSpec, fingerprint: Fingerprint, ids: Sequence[str], format: str = "zarr"
) -> "Store":
    """Create a store with a row for each of `ids`, or open the one at `path` and add rows for ids that it lacks.

    Rows never move: row r belongs to shard r // spec.shard for ever.

    Raises:
        FingerprintMismatch: the store there was made by something else; the message names the differing fields.
        StoreError: an id is unsafe, or the store there is damaged.
    """
    storage = storage_at(locate(path))
    root = storage.location
    files = format_named(format, spec.codec)
    if not storage.in_place and files.needs_folder:
        raise BadLocation(f"format is {format!r} and the store's place {root}; HDF5 needs a folder: use zarr")
    asked = Description(spec, fingerprint, format)
    header = make_header(asked)
    unseen((), ids, spec.kind)  # refuse bad ids before anything is written
    with disk_full_is_clear(f"creating {root}"):
        storage.prepare()
        while True:
            try:
                _grow(storage, files, asked, header, ids)
                return open_store(path)
            except Overtaken:
                continue  # somebody else has added rows: see what is left to add


def _grow(storage: Storage, files: Format, asked: Description, header: Record, ids: Sequence[str]) -> None:
    """Describe the store where nobody has, and add rows for those of `ids` that have none."""
    with storage.growing():
        if not storage.exists(HEADER):
            for journal in (ids_journal(storage), ledger_journal(storage), quarantine_journal(storage)):
                journal.create()
        if not create_header(storage, header):
            header = read_header(storage)
        different = parse_header(header).differences(asked)
        if different:
            raise FingerprintMismatch(
                f"store {storage.location} was made by something else ({'; '.join(different)}; here: the store, there: "
                "what was asked for); choose another store.path, or ask for what is there"
            )
        plan, contents = RowPlan(), ids_journal(storage).read()
        require_intact(contents, storage.location)
        plan.add_all(contents)
        fresh = unseen(plan.row_ids, ids, asked.spec.kind)
        if fresh or any(not holds(storage, name, entry) for name, entry in plan.files.items()):
            rows = len(plan.row_ids) + len(fresh)
            metadata = files.metadata(header, asked.spec, rows) if storage.in_place else {}
            grow(storage, fresh, metadata, contents.position)


def open_store(path: Location | str, expect: Fingerprint | None = None) -> "Store":
    """Open the store at `path`.

    Raises:
        FingerprintMismatch: it was not made by `expect`; the message names the differing fields.
        OtherVersion: another version of this program wrote it.
        StoreError: there is none, or what describes it is damaged; one line that says which file.
    """
    storage = storage_at(locate(path))
    root = storage.location
    described = parse_header(read_header(storage))
    if expect is not None and (different := described.fingerprint.differences(expect)):
        raise FingerprintMismatch(
            f"store {root} was made by something else than is expected ({'; '.join(different)}; here: the store, "
            "there: what is expected); use the store that fits, or encode again"
        )
    return Store(storage, described, format_named(described.format, described.spec.codec))


def store_exists(path: Location | str) -> bool:
    """Whether a store lies at `path`, or what is left of one."""
    return storage_at(locate(path)).exists("")


class Store:
    """An open store; make one with `open_store` or `create_store`. It can be sent to other processes.

    Attributes:
        path: its folder or URL.
        spec: its shape.
        fingerprint: what made it.
        format: `zarr` or `hdf5`.
        planned_ids: the id of every row, in row order.
    """

    def __init__(self, storage: Storage, described: Description, files: Format) -> None:
        self.path = storage.location
        self.spec = described.spec
        self.fingerprint = described.fingerprint
        self.format = described.format
        self._quarantine = Quarantine(storage)
        self._catalog = Catalog(storage, described.spec)
        self._reader = Reader(self._catalog, files)
        self._writer = Writer(self._catalog, self._reader, files, described.fingerprint.digest)

    def refresh(self) -> None:
        """See what other processes have committed or planned since.

        Raises:
            DamagedStore: a file that describes the store is damaged; the message names the line.
        """
        self._catalog.refresh()

    @property
    def planned_ids(self) -> tuple[str, ...]:
        """The id of every row, in row order."""
        return tuple(self._catalog.rows)

    @property
    def clip_ids(self) -> tuple[str, ...]:
        """The committed ids, in row order."""
        return tuple(name for name in self._catalog.rows if name in self._catalog.ledger.clips)

    @property
    def quarantine(self) -> Mapping[str, QuarantineRecord]:
        """The clips that could not be encoded, by id."""
        return MappingProxyType(self._quarantine.without(self._catalog.ledger.clips))

    @property
    def reconstruction_error(self) -> Mapping[str, float]:
        """Where tokens are stored in few bits: array -> the worst clip's root mean square error, over its own size."""
        worst: dict[str, float] = {}
        for errors in self._catalog.ledger.errors.values():
            for array, error in errors.items():
                worst[array] = max(error, worst.get(array, 0.0))
        return MappingProxyType(worst)

    @property
    def nbytes(self) -> int:
        """Bytes of the committed shards' files."""
        return sum(size for files in self._catalog.ledger.files.values() for size, _ in files.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of one clip in memory, all arrays together."""
        return self._catalog.row_bytes

    @property
    def compression_ratio(self) -> float:
        """Bytes of the committed clips in memory over those of their files; below 1 where nothing is compressed."""
        return len(self._catalog.ledger.clips) * self.row_bytes / self.nbytes if self.nbytes else 1.0

    def missing(self) -> tuple[str, ...]:
        """The ids that are neither committed nor in quarantine."""
        quarantined = self.quarantine
        return tuple(
            name for name in self._catalog.rows if name not in self._catalog.ledger.clips and name not in quarantined
        )

    def missing_shards(self, retry_quarantined: bool = False) -> list[ShardWork]:
        """The shards that still have something to do, and the ids to compute in each."""
        skip = {} if retry_quarantined else self.quarantine
        work: dict[int, list[str]] = {}
        for name, row in self._catalog.rows.items():
            if name not in self._catalog.ledger.clips and name not in skip:
                work.setdefault(self._catalog.shard_of(row), []).append(name)
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
        return PatchTokens(**self._reader.read(ids, dtype, out.tensors() if out else None, threads))

    def read_text(self, texts: Sequence[str], dtype: torch.dtype | None = None) -> TextStates:
        """The text network's states of `texts`, in that order; `dtype` of the states. Errors as in `read`."""
        if self.spec.kind != "text":
            raise StoreError(f"store {self.path} holds {self.spec.kind} rows; expected text: use read")
        return TextStates(**self._reader.read(texts, dtype))

    def buffers(self, rows: int, pin: bool = False) -> PatchTokens:
        """Memory that `read(out=...)` can fill again and again; pinned for copies to a GPU if asked."""
        return PatchTokens(**make_buffers(self.spec, rows, pin))

    def read_arrays(self, ids: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Every array by name, whatever the kind of the store, as `read` gives them."""
        return self._reader.read(ids, dtype)

    def sources(self, ids: Sequence[str]) -> dict[str, str]:
        """Hash of what each of `ids` was encoded from. Errors as in `read`."""
        return {name: record.source for name, record in zip(ids, self._catalog.records(ids), strict=True)}

    # Writing

    @contextmanager
    def lease(self, shard: int) -> Iterator[tuple[str, ...]]:
        """Own `shard` while its clips are computed and written.

        Yields:
            The shard's ids that nobody has committed by now, quarantined ones among them.

        Raises:
            ShardOwned: another live process has it; the message names host and process.
        """
        with self._writer.lease(shard) as uncommitted:
            yield uncommitted

    def write_shard(
        self,
        shard: int,
        rows: Rows,
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
        self._writer.write_shard(shard, rows, sources, failures)

    def rewrite_shard(self, shard: int, without: Sequence[str]) -> None:
        """Write a shard's files anew with its committed rows, all but the damaged ones named in `without`.

        Raises:
            ShardOwned: another live process has the shard.
        """
        self._writer.rewrite_shard(shard, without)

    def clear_leftovers(self) -> None:
        """Remove what writers that died have left of any shard. Nobody reads it; it takes room.

        Raises:
            ShardOwned: one of them is alive.
        """
        self._writer.clear_leftovers()

    # Handles

    def close(self) -> None:
        """Close the files that reading has opened."""
        self._reader.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, tuple[Location, Fingerprint]]:
        return open_store, (self.path, self.fingerprint)
