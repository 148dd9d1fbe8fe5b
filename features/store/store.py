"""The store: features of many clips, and the fingerprint of the settings that decide their values.

python -c "from egopatch.features import open_store; print(open_store('stores/x').clip_ids)"
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from egopatch.features.common.units import counted, format_bytes
from egopatch.features.formats.registry import format_named
from egopatch.features.state.catalog import Catalog
from egopatch.features.state.commit import Committer, commit_shard
from egopatch.features.state.header import HEADER, StoreHeader, parse_header, read_header
from egopatch.features.state.ledger import RowVersion
from egopatch.features.state.origin import Origin
from egopatch.features.state.quarantine import Failure, Quarantine, QuarantineRecord
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.reader import RowReader, empty_rows, first_rows
from egopatch.features.store.summary import as_html, as_text, draw
from egopatch.features.store.writer import Rows, ShardWriter
from egopatch.features.values.dtypes import row_bytes
from egopatch.features.values.encoding import dequantise
from egopatch.features.values.errors import (
    FingerprintMismatch,
    StoreError,
    one_line,
    require_count,
    require_ids,
    require_type,
)
from egopatch.features.values.location import Location
from egopatch.features.values.spec import TOKEN_ARRAYS, ArraySpec, Fingerprint, PatchTokens, TextStates
from egopatch.features.values.tensors import bytes_of

# Fields of a fingerprint that a reader knows the network by; hashes and versions follow in `features info`.
_NETWORK = ("arch", "origin", "depth", "path", "variant", "frames", "size", "model", "package")


@dataclass(frozen=True)
class ShardWork:
    """A shard and its clips that are still to be encoded.

    Attributes:
        shard: Number of the shard.
        ids: The clips.
        replaces: Id -> the committed row that is to be replaced, for those of `ids` that have one.
        retries: Id -> number of attempts so far, for those of `ids` that are in quarantine.
    """

    shard: int
    ids: tuple[str, ...]
    replaces: Mapping[str, RowVersion] = field(default_factory=dict)
    retries: Mapping[str, int] = field(default_factory=dict)


def open_store(path: Location | str, expect: Fingerprint | None = None) -> "Store":
    """Open the store at `path`.

    Raises:
        FingerprintMismatch: The store's fingerprint is not `expect`; the message names the differing fields.
        OtherVersion: Another version of this program wrote the store.
        StoreError: The store does not exist, or a file that describes it is damaged; the message names the file.
    """
    storage = storage_at(path)
    header = parse_header(read_header(storage))
    if expect is not None and (different := header.fingerprint.differences(expect, "store has", "expected")):
        raise FingerprintMismatch(
            f"store {storage.location} was created with different settings than expected ({'; '.join(different)}); use "
            "another store.path or encode again"
        )
    return Store(storage, header)


def store_exists(path: Location | str) -> bool:
    """Whether a store exists at `path`; not if its creation was interrupted, which `create_store` resumes."""
    return storage_at(path).exists(HEADER)


class Store:
    """An open store, created by `open_store` or `create_store`. It can be sent to other processes.

    Attributes:
        path: Folder or URL of the store.
        spec: Spec of the store.
        fingerprint: Fingerprint of the settings that decide the store's values.
        format: Name of the file format, `zarr` or `hdf5`.
        catalog: Rows and committed clips; `catalog.refresh()` reads what other processes have committed since.
    """

    def __init__(self, storage: Storage, header: StoreHeader) -> None:
        self.path = storage.location
        self.spec = header.spec
        self.fingerprint = header.fingerprint
        self.format = header.format
        self.catalog = Catalog(storage, header)
        self._quarantine = Quarantine(storage)
        file_format = format_named(header.format)
        self._reader = RowReader(self.catalog, file_format)
        self._writer = ShardWriter(self.catalog, self._reader, file_format)
        self._leased: set[int] = set()

    @property
    def planned_ids(self) -> tuple[str, ...]:
        """The ids of all rows, in row order."""
        return tuple(self.catalog.rows)

    @property
    def clip_ids(self) -> tuple[str, ...]:
        """The committed ids, in row order."""
        return tuple(name for name in self.catalog.rows if name in self.catalog.ledger.clips)

    @property
    def quarantine(self) -> Mapping[str, QuarantineRecord]:
        """The clips that could not be encoded, by id."""
        return MappingProxyType(self._quarantine.read(self.catalog.ledger.clips))

    @property
    def reconstruction_error(self) -> Mapping[str, float]:
        """Array -> the worst clip's relative root mean square error, for arrays that are quantised."""
        return MappingProxyType(self.catalog.ledger.worst_errors())

    @property
    def nbytes(self) -> int:
        """Bytes in the committed shards' files."""
        return self.catalog.ledger.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one clip in memory, all arrays together."""
        return self.catalog.row_bytes

    @property
    def compression_ratio(self) -> float:
        """Bytes of the committed clips in memory, divided by those of their files; below 1 without compression."""
        return self.catalog.compression_ratio

    def missing(self) -> tuple[str, ...]:
        """The ids that are neither committed nor in quarantine."""
        skip = self.quarantine
        committed = self.catalog.ledger.clips
        return tuple(name for name in self.catalog.rows if name not in committed and name not in skip)

    def missing_shards(
        self, retry_quarantined: bool = False, replace: Collection[str] = frozenset()
    ) -> list[ShardWork]:
        """The shards with clips that are still to be encoded, and the ids of those clips.

        Args:
            retry_quarantined: Include the clips in quarantine.
            replace: Committed clips to encode again.
        """
        quarantine = self.quarantine
        skip = {} if retry_quarantined else quarantine
        work: dict[int, list[str]] = {}
        for name, row in self.catalog.rows.items():
            if name in replace or (name not in self.catalog.ledger.clips and name not in skip):
                work.setdefault(self.catalog.shard_of(row), []).append(name)
        versions = self.catalog.ledger.versions
        return [
            ShardWork(
                shard,
                tuple(ids),
                versions(ids),
                {name: quarantine[name].attempts for name in ids if name in quarantine},
            )
            for shard, ids in sorted(work.items())
        ]

    # Reading

    def read(
        self,
        ids: Iterable[str],
        dtype: torch.dtype | None = None,
        out: PatchTokens | None = None,
        threads: int = 1,
    ) -> PatchTokens:
        """Read the patch tokens of `ids`, in that order; an id may be repeated. Every checksum is checked.

        Args:
            ids: Clips to read.
            dtype: Floating-point dtype of `patches` and `coarse`, by default the stored one. With a dtype, patches are
                multiplied by their `scale`.
            out: Buffers for the stored bytes (such as pinned ones) with at least a row for each id, from `buffers`.
                The result is their first rows, so the next read into them changes it.
            threads: Number of threads that read at the same time.

        Raises:
            AbsentClip: Some ids were never committed; the message names them.
            DamagedStore: A clip's bytes differ from those that were committed; the message names the clip.
            ValueError: `dtype` is not a floating-point dtype of torch, or `threads` is below 1.
        """
        self._require_kind("patches", "read_text")
        return PatchTokens(**self.read_arrays(ids, dtype, out, threads))

    def read_text(self, texts: Iterable[str], dtype: torch.dtype | None = None) -> TextStates:
        """Read the text network's states of `texts`, in that order, in `dtype`. Errors as in `read`."""
        self._require_kind("text", "read")
        return TextStates(**self.read_arrays(texts, dtype))

    def _require_kind(self, kind: str, instead: str) -> None:
        if self.spec.kind != kind:
            raise StoreError(f"store {self.path} holds {self.spec.kind} rows; expected {kind}: use {instead}")

    def read_arrays(
        self,
        ids: Iterable[str],
        dtype: torch.dtype | None = None,
        out: PatchTokens | None = None,
        threads: int = 1,
    ) -> dict[str, Tensor]:
        """Read every array by name, for stores of either kind; arguments and errors as in `read`."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"dtype is {one_line(dtype)}; expected a floating-point dtype of torch, such as torch.float16"
            )
        tensors = self._read(self.spec.arrays, ids, out, threads)
        return tensors if dtype is None else _in_dtype(tensors, dtype)

    def _read(
        self, arrays: Sequence[ArraySpec], ids: Iterable[str], out: PatchTokens | None = None, threads: int = 1
    ) -> dict[str, Tensor]:
        """As `read_arrays`, but only for the given `arrays`."""
        require_count("threads", threads, "thread")
        ids = _listed(ids)
        records = self.catalog.clip_records(ids)
        if out is not None:
            require_type("out", out, PatchTokens, "buffers of this store: store.buffers(rows)")
        buffers = None if out is None else out.tensors()
        tensors = {
            array.name: empty_rows(array, len(ids)) if buffers is None else first_rows(array, len(ids), buffers)
            for array in arrays
        }
        targets = [(array, bytes_of(tensors[array.name]).reshape(len(ids), row_bytes(array))) for array in arrays]

        def read_clip(index: int) -> None:
            self._reader.read_into([(rows[index], array) for array, rows in targets], ids[index], records[index])

        threads = max(threads, self.catalog.storage.parallel_reads)
        if threads == 1 or len(ids) == 1:
            for index in range(len(ids)):
                read_clip(index)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
                for _ in pool.map(read_clip, range(len(ids))):
                    pass
        return tensors

    def to_numpy(
        self, ids: Iterable[str], dtype: torch.dtype = torch.float32, threads: int = 1
    ) -> dict[str, np.ndarray]:
        """Read every array by name into NumPy, the batch first; tokens in `dtype`. Arguments and errors as in `read`.

        Raises:
            ValueError: NumPy has no such dtype (bfloat16, float8).
        """
        if dtype not in (torch.float16, torch.float32, torch.float64):
            raise ValueError(
                f"dtype is {one_line(dtype)}; expected one that NumPy has: torch.float16, float32 or float64"
            )
        return {name: tensor.numpy() for name, tensor in self.read_arrays(ids, dtype, threads=threads).items()}

    def video_times(self, ids: Iterable[str]) -> Tensor:
        """[B, T] seconds from the start of the video file to each encoded frame; `timestamps` start with the clip.

        Where a position in time covers several frames, it has the mean of theirs. Errors as in `read`.

        Raises:
            StoreError: An earlier version stored a clip without its stretch of video.
        """
        times = [array for array in self.spec.arrays if array.name == "timestamps"]
        if not times:
            raise StoreError(f"store {self.path} has no timestamps; expected a store of videos")
        ids = _listed(ids)
        read, versions = self.catalog.read_unchanged(ids, lambda: self._read(times, ids))
        origins = {name: version.origin for name, version in versions.items()}
        if unknown := [name for name in ids if origins[name] is None]:
            raise StoreError(
                f"store {self.path} does not record start and end of {counted(len(unknown), 'clip')}, such as "
                f"{unknown[0]!r}: they were imported, or encoded by an earlier version; use timestamps, which start "
                "with the clip"
            )
        starts = [origin.start_s or 0.0 for name in ids if (origin := origins[name]) is not None]
        return read["timestamps"].double() + torch.tensor(starts, dtype=torch.float64)[:, None]

    def buffers(self, rows: int, pin: bool = False) -> PatchTokens:
        """Memory that `read(out=...)` can fill again and again; pinned for copies to a GPU if requested.

        Raises:
            StoreError: The store holds texts, which `read_text` reads without buffers.
            TypeError, ValueError: `rows` is no whole number, or negative.
        """
        self._require_kind("patches", "read_text")
        require_type("rows", rows, int, "a number of clips")
        if rows < 0:
            raise ValueError(f"rows is {rows}; expected 0 or more")
        return PatchTokens(**{array.name: empty_rows(array, rows, pin) for array in self.spec.arrays})

    def sources(self, ids: Iterable[str]) -> dict[str, str]:
        """Id -> hash of the video (or text) that was encoded. Errors as in `read`."""
        ids = _listed(ids)
        return {name: record.source for name, record in zip(ids, self.catalog.clip_records(ids), strict=True)}

    def origins(self) -> dict[str, Origin | None]:
        """Id -> stretch of video that was encoded, of every committed clip; None where an earlier version stored it."""
        return self.catalog.ledger.origins()

    def machines(self) -> dict[str, int]:
        """Machine -> number of committed clips that it computed; the empty name stands for unknown machines."""
        return self.catalog.ledger.machines()

    # Looking, in a notebook or at a prompt

    def show(self, clip_id: str, frames: NDArray[np.float32] | None = None) -> Image.Image:
        """A picture of a clip: its frames with their times, bright where the saliency is high.

        Args:
            clip_id: The clip.
            frames: [F, 3, H, W] in [0, 1], the part of each frame that the encoder saw, as `egopatch.clip_frames`
                decodes it; by default white, so that the picture is of the saliency alone.

        Raises:
            AbsentClip, DamagedStore: As in `read`.
            StoreError: The store does not record the grid of its patches.
            ValueError: The frames have another shape, whole numbers, or values far outside [0, 1].
        """
        if self.spec.grid is None:
            raise StoreError(f"store {self.path} does not record the grid of its patches; use to_pixels with a grid")
        return draw(self.read([clip_id]), self.spec.grid, frames)

    def summary(self, path: str | None = None) -> str:
        """Facts on the store, one a line, as printing it shows them; with `path` in place of its own, if given."""
        return as_text(self._facts(path))

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return as_html(self._facts())

    def _facts(self, path: str | None = None) -> list[tuple[str, str]]:
        made_by, stored = self.fingerprint.fields, len(self.catalog.ledger.clips)
        clips, first, rows = self.spec.kind == "patches", self.spec.arrays[0], min(stored, 8)
        network = [f"{name} {made_by[name]}" for name in _NETWORK if made_by.get(name) is not None]
        call = f"store.{'read' if clips else 'read_text'}(store.clip_ids[:{rows}])"
        return [
            ("store", str(self.path) if path is None else path),
            ("clips" if clips else "texts", f"{stored} of {len(self.catalog.rows)} stored"),
            ("size", f"{format_bytes(self.nbytes)}, {self.format}, {format_bytes(self.row_bytes)} a row"),
            *((array.name, f"{array.dtype} {list(array.shape)}") for array in self.spec.arrays),
            ("made by", ", ".join(network) or "an unknown program"),
            ("next", f"{call}  # {first.name} {[rows, *first.shape]}" if rows else "run `extract run` to encode clips"),
        ]

    # Writing

    @contextmanager
    def lease(self, shard: int) -> Iterator[tuple[str, ...]]:
        """Own `shard` while its clips are computed and written.

        Yields:
            The shard's ids that are not committed yet, including quarantined ones.

        Raises:
            ShardOwned: Another running process holds the lease; the message names host and process.
        """
        with self.catalog.storage.lease(shard):
            self._leased.add(shard)
            try:
                self.catalog.refresh(shard)
                yield tuple(name for name in self.catalog.ids_of(shard) if name not in self.catalog.ledger.clips)
            finally:
                self._leased.discard(shard)

    def write_shard(
        self,
        shard: int,
        rows: Rows,
        sources: Mapping[str, str],
        failures: Mapping[str, Failure] = MappingProxyType({}),
        origins: Mapping[str, Origin] = MappingProxyType({}),
        replaces: Mapping[str, RowVersion] = MappingProxyType({}),
        machines: Mapping[str, str] = MappingProxyType({}),
        committer: Committer = commit_shard,
        finite: Collection[str] = (),
    ) -> None:
        """Commit clips of one shard: all of them, or none if anything fails. The shard's other rows do not change.

        Args:
            shard: Number of the shard.
            rows: Id -> array -> tensor, without the batch.
            sources: Id -> hash of the video (or text) that was encoded.
            failures: Clips that could not be encoded; they go to quarantine.
            origins: Id -> stretch of video that was encoded.
            replaces: Id -> a committed row, as in `ShardWork`. A clip in `rows` replaces that row, and a clip
                in `failures` removes it; if another process has replaced the row already, its row stays.
            machines: Id -> machine that computed the row, in words: on another one its last bits may differ.
            committer: Makes the commit; it may hand the work to another process.
            finite: Ids in `rows` whose tensors the caller has found to be finite. They are not checked again, unless
                the store has another dtype.

        Raises:
            ShardOwned: Another running process holds the shard's lease.
            StoreError: An id belongs to another shard; a tensor is missing, has another shape, or holds NaN or
                infinity; or the disk is full. The message names id and array.
        """
        with nullcontext() if shard in self._leased else self.lease(shard):
            self._writer.write(shard, rows, sources, failures, origins, replaces, machines, committer, finite)

    def rewrite_shard(self, shard: int, without: Sequence[str]) -> None:
        """Write a shard's files again with its committed rows, except for the damaged ones named in `without`.

        Raises:
            ShardOwned: Another running process holds the shard's lease.
        """
        with self.lease(shard):
            self._writer.rewrite(shard, without)

    def clear_leftovers(self) -> None:
        """Remove the files that killed writers left; nobody reads them.

        Raises:
            ShardOwned: One of the writers is still running.
        """
        committed = self.catalog.ledger
        for shard, write_ids in sorted(self.catalog.storage.write_ids_by_shard().items()):
            if write_ids - {committed.write_id(shard)}:
                with self.lease(shard):
                    self._writer.clear_leftovers(shard)

    # A context manager closes the files that reading has opened.

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def __reduce__(self) -> tuple[object, tuple[Location, Fingerprint]]:
        return open_store, (self.catalog.storage.full_location, self.fingerprint)


def _listed(ids: Iterable[str]) -> list[str]:
    """The ids of any iterable as a list."""
    require_ids(ids)
    return list(ids)


def _in_dtype(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The arrays with their tokens in `dtype`; quantised patches are multiplied by their scale."""
    scale = tensors.pop("scale", None)
    converted = {name: tensor.to(dtype) if name in TOKEN_ARRAYS else tensor for name, tensor in tensors.items()}
    if scale is not None:
        converted["patches"] = dequantise(tensors["patches"], scale, dtype)
    return converted
