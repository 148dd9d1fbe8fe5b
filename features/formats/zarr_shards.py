"""Zarr v3: one sharded array per `ArraySpec`; an inner chunk is one row, a shard is `spec.shard` rows.

zarr-python writes the metadata, and any Zarr v3 reader can open the store. Shards are written and read here, because
that is several times faster; tests compare both with zarr-python, row for row and byte for byte.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numcodecs
import numpy as np
import zarr
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.chunk_key_encodings import ChunkKeyEncodingParams
from zarr.storage import MemoryStore

from egopatch.features.formats.interface import ArrayRows, Chunk, StagedFile, SummedRow
from egopatch.features.io.fields import Record
from egopatch.features.io.files import SummedFile, crc32c
from egopatch.features.storage.interface import OpenFile, ReadableFiles, Storage
from egopatch.features.values.dtypes import disk_dtype, row_bytes
from egopatch.features.values.errors import DamagedStore
from egopatch.features.values.spec import ArraySpec, StoreSpec

_EMPTY = 2**64 - 1  # offset and size, in a shard's index, of a chunk that was never written
_CRC = 4
# Rows of at least a page are aligned: the kernel copies from an unaligned offset at half the speed.
_ALIGN, _PAGE = 64, 4096
_ZSTD_LEVEL = 3
_BLOSC_LEVEL = 5


class ZarrFormat:
    """See `interface.Format`."""

    needs_folder = False

    def metadata_files(self, header: Record, spec: StoreSpec, rows: int) -> dict[str, bytes]:
        """The group's and every array's `zarr.json`; the group's attributes repeat the store's header."""
        files: dict = {}
        group = zarr.create_group(MemoryStore(files), attributes=header)
        for array in spec.arrays:
            _create_array(group, array, spec, rows)
        return {path: buffer.to_bytes() for path, buffer in files.items()}

    def header_copy(self, storage: Storage) -> Record | None:
        """The copy of the header in the group's attributes, for repairs."""
        try:
            return json.loads(storage.read("zarr.json"))["attributes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def file_names(self, spec: StoreSpec, shard: int) -> tuple[str, ...]:
        """One file for each array."""
        return tuple(_shard_file(array, shard) for array in spec.arrays)

    def stage(
        self, folder: Path, spec: StoreSpec, shard: int, slots: Sequence[int], arrays: ArrayRows
    ) -> dict[str, StagedFile]:
        """Each file is row, checksum, padding, row, checksum, ..., index, checksum; the index has each row's offset."""
        staged = {}
        for array, rows in arrays:
            compressor = _compressor(array, spec)
            index = np.full((spec.shard, 2), _EMPTY, "<u8")
            path = folder / array.name
            with SummedFile(path) as file:
                for slot, row in zip(slots, rows, strict=True):
                    if compressor is not None:
                        row = SummedRow.of(np.frombuffer(compressor.python.encode(row.content), np.uint8))
                    if row.content.nbytes >= _PAGE:
                        file.write(bytes(-file.size % _ALIGN))
                    index[slot] = file.size, row.content.nbytes + _CRC
                    _write_checked(file, row)
                _write_checked(file, SummedRow.of(index))
            staged[_shard_file(array, shard)] = StagedFile(path, file.sum)
        return staged

    def open(self, files: ReadableFiles, spec: StoreSpec, shard: int, index: object = None) -> "ZarrShard":
        """Open every array's file and check its index, which is small and therefore read each time."""
        return ZarrShard(files, spec, shard)


class ZarrShard:
    """See `interface.OpenShard`."""

    index = None

    def __init__(self, files: ReadableFiles, spec: StoreSpec, shard: int) -> None:
        self._arrays = {array.name: _open_indexed(files, _shard_file(array, shard), spec) for array in spec.arrays}
        self._compressors = {array.name: _compressor(array, spec) for array in spec.arrays}

    def find_row(self, array: ArraySpec, slot: int) -> Chunk:
        """The place of row `slot` in the shard's index."""
        file, index = self._arrays[array.name]
        compressor = self._compressors[array.name]
        offset, size = (int(number) for number in index[slot])
        if offset == _EMPTY:
            raise DamagedStore(f"{file.path} has no row {slot} of its shard")
        wrong = size != row_bytes(array) + _CRC if compressor is None else size <= _CRC
        if wrong or offset + size > file.size:
            raise DamagedStore(f"{file.path} places row {slot} of its shard outside the file")
        return Chunk(file, offset, size, None if compressor is None else partial(_decode, compressor.python))


def _shard_file(array: ArraySpec, shard: int) -> str:
    return f"{array.name}/{'.'.join(['c', str(shard), *['0'] * len(array.shape)])}"


def _write_checked(file: SummedFile, row: SummedRow) -> None:
    file.write(row.content, row.crc32)
    file.write(row.crc32c.to_bytes(_CRC, "little"))


@dataclass(frozen=True)
class _Compressor:
    """A codec as the metadata name it, and the object that zarr-python would create from that."""

    zarr: BytesBytesCodec
    python: numcodecs.abc.Codec


def _compressor(array: ArraySpec, spec: StoreSpec) -> _Compressor | None:
    match spec.codec:
        case "zstd":
            return _Compressor(ZstdCodec(level=_ZSTD_LEVEL), numcodecs.Zstd(_ZSTD_LEVEL))
        case "blosc-zstd":
            width = np.dtype(disk_dtype(array.dtype).numpy).itemsize
            return _Compressor(
                BloscCodec(typesize=width, cname="zstd", clevel=_BLOSC_LEVEL, shuffle="shuffle"),
                numcodecs.Blosc("zstd", _BLOSC_LEVEL, numcodecs.Blosc.SHUFFLE, typesize=width),
            )
    return None


def _decode(codec: numcodecs.abc.Codec, content: bytes, row: np.ndarray) -> None:
    # The checksum comes first, because decompressors trust their input.
    if crc32c(content[:-_CRC]).to_bytes(_CRC, "little") != content[-_CRC:]:
        raise ValueError("their checksum differs")
    codec.decode(content[:-_CRC], out=row)  # raises if the bytes exceed the row; the ledger's checksum reveals too few


def _create_array(group: zarr.Group, array: ArraySpec, spec: StoreSpec, rows: int) -> zarr.Array:
    on_disk, compressor = disk_dtype(array.dtype), _compressor(array, spec)
    return group.create_array(
        array.name,
        shape=(rows, *array.shape),
        chunks=(1, *array.shape),
        shards=(spec.shard, *array.shape),
        dtype=on_disk.numpy,
        # One folder for each array, not four for each shard.
        chunk_key_encoding=ChunkKeyEncodingParams(name="default", separator="."),
        filters=None,
        compressors=[*([] if compressor is None else [compressor.zarr]), Crc32cCodec()],
        fill_value=on_disk.fill_value,
        attributes={"dtype": array.dtype},
    )


def _open_indexed(files: ReadableFiles, name: str, spec: StoreSpec) -> tuple[OpenFile, np.ndarray]:
    try:
        file = files.open(name)
    except OSError as error:
        raise DamagedStore(f"{name} cannot be opened: {error.strerror}") from error
    size = 16 * spec.shard + _CRC
    if file.size < size:
        raise DamagedStore(f"{file.path} has {file.size} bytes; expected at least {size}, the size of its index")
    tail = file.read(size, file.size - size)
    if crc32c(tail[:-_CRC]).to_bytes(_CRC, "little") != tail[-_CRC:]:
        raise DamagedStore(f"{file.path} has a damaged index")
    return file, np.frombuffer(tail[:-_CRC], "<u8").reshape(spec.shard, 2)
