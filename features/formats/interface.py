"""The protocols of a file format, which `zarr_shards` and `hdf5_shards` each implement."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from egopatch.features.io.fields import FileSum, Record
from egopatch.features.io.files import crc32, crc32c
from egopatch.features.storage.interface import OpenFile, ReadableFiles, Storage
from egopatch.features.values.dtypes import are_finite
from egopatch.features.values.errors import DamagedStore, StoreError
from egopatch.features.values.spec import ArraySpec, StoreSpec

# Format -> its codecs. They stand here, because the libraries of the formats take half a second to import.
CODECS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"zarr": ("none", "zstd", "blosc-zstd"), "hdf5": ("none", "gzip")}
)
_BLOCK = 1 << 23  # bytes; each block gives up the GIL four times, which other threads may then keep for a while


@dataclass(frozen=True)
class SummedRow:
    """A row in the disk dtype, with the CRC-32C and the CRC-32 of its bytes."""

    content: np.ndarray
    crc32c: int
    crc32: int

    @classmethod
    def of(cls, content: np.ndarray, dtype: str = "") -> "SummedRow":
        """The row with its checksums.

        Args:
            content: The row.
            dtype: Name of the dtype if its numbers must be finite.

        Raises:
            FloatingPointError: A number is not finite.
        """
        flat = content.reshape(-1).view(np.uint8)
        castagnoli = ethernet = 0
        # In few blocks, since each pass over one gives up the GIL, which other threads may then keep.
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            # This sum comes first: it brings the block into the cache faster than the others do.
            ethernet = crc32(block, ethernet)
            if not are_finite(block, dtype):
                raise FloatingPointError(f"{dtype} holds NaN or infinity")
            castagnoli = crc32c(block, castagnoli)
        return cls(content, castagnoli, ethernet)


@dataclass(frozen=True)
class StagedFile:
    """A file that was written, not yet synced: its path, and its size and CRC-32."""

    path: Path
    sum: FileSum


ArrayRows = Iterable[tuple[ArraySpec, Iterable[SummedRow]]]  # each array with its rows


@dataclass(frozen=True)
class Chunk:
    """The place of one row in a file.

    Attributes:
        file: File that contains the row.
        offset: Offset of the row's first byte.
        size: Size in bytes, including what the format adds to a row.
        decode: Decodes those bytes into a row of the right size; None if the file holds the row's bytes unchanged.
            Raises ValueError or RuntimeError for bytes that the codec did not write.
    """

    file: OpenFile
    offset: int
    size: int
    decode: Callable[[bytes, np.ndarray], None] | None = None

    def read_into(self, row: np.ndarray) -> int:
        """Fill `row`, contiguous bytes; returns the CRC-32C of its new content.

        Raises:
            DamagedStore: The bytes cannot be read or decoded.
        """
        if self.decode is None:
            return self.file.read_into(row, self.offset)
        content = self.file.read(self.size, self.offset)
        try:
            self.decode(content, row)
        except (ValueError, RuntimeError) as error:
            raise DamagedStore(f"{self.file.path} holds bytes that cannot be decompressed ({error})") from error
        return crc32c(row)


class OpenShard(Protocol):
    """A shard's files, open for reading."""

    @property
    def index(self) -> object:
        """Data that `Format.open` need not read again when the shard is opened again; None if it is little."""

    def find_row(self, array: ArraySpec, slot: int) -> Chunk:
        """The place of row `slot` of `array`.

        Raises:
            DamagedStore: The file has no such row, or an impossible place for it.
        """


class Format(Protocol):
    """A file format for shards.

    Attributes:
        needs_folder: Whether the format's library reads only local files.
    """

    needs_folder: bool

    def metadata_files(self, header: Record, spec: StoreSpec, rows: int) -> dict[str, bytes]:
        """The files, by path inside the store, that describe arrays of `rows` rows to other tools."""

    def header_copy(self, storage: Storage) -> Record | None:
        """The copy of the header in the metadata files, for repairs; None where they are damaged too."""

    def file_names(self, spec: StoreSpec, shard: int) -> tuple[str, ...]:
        """Names of the files of `shard`, as paths inside the store."""

    def stage(
        self, folder: Path, spec: StoreSpec, shard: int, slots: Sequence[int], arrays: ArrayRows
    ) -> dict[str, StagedFile]:
        """Write the files of `shard` into `folder`: an array's i-th row goes to slots[i].

        Returns:
            Name, as in `file_names(spec, shard)`, -> the file in `folder`.
        """

    def open(self, files: ReadableFiles, spec: StoreSpec, shard: int, index: object = None) -> OpenShard:
        """Open the files of `shard`; `index`, kept from an earlier opening, is used if the files are still the same.

        Raises:
            DamagedStore: A file is missing, cut short or of another format.
        """


def require_format(name: str, codec: str) -> None:
    """Refuse a file format that does not exist, or that does not support the codec.

    Raises:
        StoreError: The message names the formats, or the format's codecs.
    """
    if name not in CODECS:
        raise StoreError(f"format {name!r} is unknown; expected one of {', '.join(CODECS)}")
    if codec not in CODECS[name]:
        raise StoreError(f"codec is {codec!r}; expected one of {name}'s codecs: {', '.join(CODECS[name])}")
