"""HDF5: one file a shard, one chunk a row, fletcher32; `index.h5` joins the shards as virtual datasets for other tools.

This reader gets all chunk offsets from the file once and then reads each row at its offset: h5py would check fletcher32
at a fraction of the speed, and the ledger has a CRC-32C for every row. For the same reason files are read without
HDF5's own locks, which some file systems do not have.
"""

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from egopatch.features.formats.interface import ArrayRows, Chunk, StagedFile
from egopatch.features.io.fields import Record
from egopatch.features.io.files import identity_of, opening, size_and_crc
from egopatch.features.storage.interface import ReadableFiles, Storage
from egopatch.features.values.dtypes import disk_dtype, row_bytes
from egopatch.features.values.errors import DamagedStore, StoreError
from egopatch.features.values.spec import ArraySpec, StoreSpec

_CHECKSUM = 4
# Deflate after a byte shuffle: every HDF5 library can read it without plugins.
_GZIP = {"compression": "gzip", "compression_opts": 4, "shuffle": True}
_VERSION = ("v110", "v110")  # file format with checksums for its metadata
# The kernel copies a row from an unaligned offset at half the speed.
_ALIGNED = {"alignment_threshold": 4096, "alignment_interval": 64}
# Errors that h5py raises for damaged or forged files.
_UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)


class Hdf5Format:
    """See `interface.Format`."""

    needs_folder = True

    def metadata_files(self, header: Record, spec: StoreSpec, rows: int) -> dict[str, bytes]:
        """`index.h5`, with a copy of the store's header in its attributes. Rows that were never written read as NaN."""
        # In a file object, since images of the core driver have wrong checksums before HDF5 2.
        content = io.BytesIO()
        with h5py.File(content, "w", libver=_VERSION) as index:
            index.attrs["header"] = json.dumps(header, sort_keys=True)
            for array in spec.arrays:
                on_disk = disk_dtype(array.dtype)
                layout = h5py.VirtualLayout((rows, *array.shape), on_disk.numpy)
                for first in range(0, rows, spec.shard):
                    last = min(first + spec.shard, rows)
                    source = h5py.VirtualSource(
                        _shard_file(first // spec.shard), array.name, (spec.shard, *array.shape), on_disk.numpy
                    )
                    layout[first:last] = source[: last - first]
                layout.dcpl.set_obj_track_times(False)  # the same rows give the same bytes
                dataset = index.create_virtual_dataset(array.name, layout, fillvalue=on_disk.fill_value)
                dataset.attrs["dtype"] = array.dtype
        return {"index.h5": content.getvalue()}

    def header_copy(self, storage: Storage) -> Record | None:
        """The copy of the header in `index.h5`, for repairs."""
        try:
            with open_unlocked(storage.open("index.h5").path) as index:
                return json.loads(index.attrs["header"])
        except _UNREADABLE:
            return None

    def file_names(self, spec: StoreSpec, shard: int) -> tuple[str, ...]:
        """One file for all arrays."""
        return (_shard_file(shard),)

    def stage(
        self, folder: Path, spec: StoreSpec, shard: int, slots: Sequence[int], arrays: ArrayRows
    ) -> dict[str, StagedFile]:
        """Rows that are not in `slots` get no chunk, so other tools read NaN there."""
        # The file is created in memory, because the HDF5 library may crash the whole process when the disk is full.
        image = io.BytesIO()
        with h5py.File(image, "w", libver=_VERSION, **_ALIGNED) as file:
            for array, rows in arrays:
                on_disk = disk_dtype(array.dtype)
                dataset = file.create_dataset(
                    array.name,
                    (spec.shard, *array.shape),
                    on_disk.numpy,
                    chunks=(1, *array.shape),
                    fletcher32=True,
                    fillvalue=on_disk.fill_value,
                    **(_GZIP if spec.codec == "gzip" else {}),
                )
                dataset.attrs["dtype"] = array.dtype
                for slot, row in zip(slots, rows, strict=True):
                    dataset[slot] = row.content
        path = folder / "shard.h5"
        content = image.getvalue()
        path.write_bytes(content)
        return {_shard_file(shard): StagedFile(path, size_and_crc(content))}

    def open(self, files: ReadableFiles, spec: StoreSpec, shard: int, index: object = None) -> "Hdf5Shard":
        """Open the file and read its chunk offsets, which takes longer than reading a row."""
        return Hdf5Shard(files, _shard_file(shard), spec, index)


@dataclass(frozen=True)
class _Index:
    """Chunk offsets in one file.

    Attributes:
        file: Identity of the file, as in `OpenFile`.
        chunks: Array -> [slots, 2], offset and size of each row's chunk; zeros where there is none.
    """

    file: tuple[int, ...]
    chunks: Mapping[str, np.ndarray]


class Hdf5Shard:
    """See `interface.OpenShard`."""

    def __init__(self, files: ReadableFiles, name: str, spec: StoreSpec, index: object) -> None:
        self._compressed = spec.codec == "gzip"
        try:
            while True:
                self._file = files.open(name)
                if isinstance(index, _Index) and index.file == self._file.identity:
                    self.index = index
                    return
                path = Path(self._file.path)
                with opening(path), open_unlocked(path) as file:
                    chunks = {array.name: _chunks(file, array, spec) for array in spec.arrays}
                if self._file.identity == identity_of(path.stat()):
                    self.index = _Index(self._file.identity, chunks)
                    return
                # A writer has replaced the file, perhaps between its two openings here.
        except DamagedStore as error:
            raise DamagedStore(f"{name} {error}") from error
        except StoreError:
            raise
        except _UNREADABLE as error:
            raise DamagedStore(f"{name} cannot be opened: {' '.join(str(error).split())}") from error

    def find_row(self, array: ArraySpec, slot: int) -> Chunk:
        """The place of row `slot` in the file's chunk index."""
        offset, size = (int(number) for number in self.index.chunks[array.name][slot])
        if not size:
            raise DamagedStore(f"{self._file.path} has no row {slot} of {array.name}")
        if offset + size > self._file.size:
            raise DamagedStore(f"{self._file.path} places row {slot} of {array.name} outside the file")
        width = np.dtype(disk_dtype(array.dtype).numpy).itemsize
        return Chunk(self._file, offset, size, partial(_decode, width) if self._compressed else None)


def open_unlocked(path: Path | str) -> h5py.File:
    """Open the file for reading without HDF5's locks, or with them if this process already has it open that way."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")


def _shard_file(shard: int) -> str:
    return f"shards/{shard:08d}.h5"


def _chunks(file: h5py.File, array: ArraySpec, spec: StoreSpec) -> np.ndarray:
    """Offset and size of each slot's chunk; refuses links out of the file and chunks of another size."""
    if not isinstance(file.get(array.name, getlink=True), h5py.HardLink):
        raise DamagedStore(f"does not contain {array.name} itself; links to other files are not followed")
    dataset = file[array.name]
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise DamagedStore(f"keeps {array.name} in other files; external storage is not followed")
    expected = ((spec.shard, *array.shape), np.dtype(disk_dtype(array.dtype).numpy), (1, *array.shape))
    found = (dataset.shape, dataset.dtype, dataset.chunks)
    if found != expected:
        raise DamagedStore(f"has {array.name} of shape, dtype and chunk {found}; expected {expected}")
    filters = ("gzip" if spec.codec == "gzip" else None, spec.codec == "gzip", None, True)
    if (dataset.compression, dataset.shuffle, dataset.scaleoffset, dataset.fletcher32) != filters:
        raise DamagedStore(f"has {array.name} with filters that differ from codec {spec.codec!r}")
    chunks = np.zeros((spec.shard, 2), np.int64)

    def add(chunk: h5py.h5d.StoreInfo) -> None:
        whole = chunk.size == row_bytes(array) + _CHECKSUM or (spec.codec == "gzip" and chunk.size > _CHECKSUM)
        if whole and chunk.filter_mask == 0:
            chunks[chunk.chunk_offset[0]] = chunk.byte_offset, chunk.size

    dataset.id.chunk_iter(add)
    return chunks


def _decode(width: int, content: bytes, row: np.ndarray) -> None:
    """Undo deflate and shuffle, which puts the first bytes of all numbers first, then the second bytes, and so on."""
    inflate = zlib.decompressobj()
    try:
        planes = inflate.decompress(content[:-_CHECKSUM], row.size)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(planes) != row.size:
        raise ValueError(f"{len(planes)} bytes; expected {row.size}")
    row.reshape(-1, width)[:] = np.frombuffer(planes, np.uint8).reshape(width, -1).T
