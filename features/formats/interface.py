"""What a file format has to offer; `zarr_store` and `hdf5_store` each offer it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from egopatch.features.io.fields import Record
from egopatch.features.io.files import crc32c
from egopatch.features.storage.interface import Files, OpenFile, Storage
from egopatch.features.values.errors import DamagedStore
from egopatch.features.values.spec import ArraySpec, StoreSpec

Blocks = Iterable[tuple[ArraySpec, Iterable[np.ndarray]]]  # one an array: its rows, in the disk dtype


@dataclass(frozen=True)
class Chunk:
    """Where one row lies.

    Attributes:
        file: that holds it.
        offset: of its first byte.
        size: in bytes, with whatever the format adds.
        decode: from those bytes into a row of the right size; None where the row's bytes lie there as they are.
            Raises ValueError or RuntimeError where they are not what the codec made.
    """

    file: OpenFile
    offset: int
    size: int
    decode: Callable[[bytes, np.ndarray], None] | None = None

    def read_into(self, row: np.ndarray) -> int:
        """Fill `row`, contiguous bytes; returns the CRC-32C of what it holds now.

        Raises:
            DamagedStore: the bytes cannot be read or decoded.
        """
        if self.decode is None:
            return self.file.read_into(row, self.offset)
        try:
            self.decode(self.file.read(self.size, self.offset), row)
        except (ValueError, RuntimeError) as error:
            raise DamagedStore(f"{self.file.path} holds bytes that cannot be decompressed ({error})") from error
        return crc32c(row)


class OpenShard(Protocol):
    """A shard's files, open for reading."""

    def find(self, array: ArraySpec, slot: int) -> Chunk:
        """Where row `slot` of `array` lies.

        Raises:
            DamagedStore: the file does not say, or says something impossible.
        """


class Format(Protocol):
    """One way of keeping shards in files."""

    name: str
    needs_folder: bool  # whether its library reads nothing but files
    codecs: tuple[str, ...]  # what `StoreSpec.codec` can be, `none` first

    def metadata(self, header: Record, spec: StoreSpec, rows: int) -> dict[str, bytes]:
        """The files, by path inside the store, that tell other tools about arrays of `rows` rows."""

    def header_of(self, storage: Storage) -> Record | None:
        """The header as those files repeat it, for repairs; None where they are damaged too."""

    def files(self, spec: StoreSpec, shard: int) -> tuple[str, ...]:
        """The files of `shard`, by path inside the store."""

    def stage(self, folder: Path, spec: StoreSpec, shard: int, slots: Sequence[int], blocks: Blocks) -> dict[str, Path]:
        """Write the files of `shard` into `folder`: an array's i-th row goes to slots[i].

        Returns:
            Where each of `files(spec, shard)` now waits.
        """

    def open(self, files: Files, spec: StoreSpec, shard: int) -> OpenShard:
        """Open the files of `shard`.

        Raises:
            DamagedStore: a file is missing, cut short or not of this format.
        """
