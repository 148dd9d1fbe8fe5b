"""`store.json`: what the store is. Written once, with its own checksum.

Its version is that of everything in the store, journals included. A program refuses other versions than its own, by
number, and leaves such a store alone.
"""

import json
from dataclasses import asdict, dataclass

from egopatch.features.io.fields import MalformedRecord, Record, take, take_all, take_count
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.journal import decode_line, encode_line
from egopatch.features.values.dtypes import stored
from egopatch.features.values.errors import DamagedStore, OtherVersion, StoreError
from egopatch.features.values.spec import ArraySpec, Fingerprint, StoreSpec

VERSION = 3
HEADER = "store.json"  # its name in the store


@dataclass(frozen=True)
class Description:
    """What a header says: the store's shape, what made it, and its file format's name."""

    spec: StoreSpec
    fingerprint: Fingerprint
    format: str

    def differences(self, other: "Description") -> list[str]:
        """One line a field that differs: those of the fingerprint by name, then format and spec."""
        lines = self.fingerprint.differences(other.fingerprint)
        if self.format != other.format:
            lines.append(f"format: {self.format!r} here, {other.format!r} there")
        here, there = _plain(asdict(self.spec)), _plain(asdict(other.spec))
        lines += [
            f"spec.{name}: {here[name]!r} here, {there[name]!r} there" for name in here if here[name] != there[name]
        ]
        return lines


def make_header(described: Description) -> Record:
    """The header as JSON values."""
    for array in described.spec.arrays:
        stored(array.dtype)
    return _plain(
        {
            "version": VERSION,
            "format": described.format,
            "spec": asdict(described.spec),
            "fingerprint": dict(described.fingerprint.fields),
        }
    )


def create_header(storage: Storage, header: Record) -> bool:
    """Write it where there is none; false where there is one."""
    return storage.create(HEADER, encode_line(0, header))


def write_header(storage: Storage, header: Record) -> None:
    """Write it in one step, whatever is there."""
    storage.write(HEADER, encode_line(0, header))


def read_header(storage: Storage) -> Record:
    """Read it; `parse_header` says what it means.

    Raises:
        OtherVersion: another version of this program wrote the store.
        StoreError: there is no store.
        DamagedStore: the file is damaged.
    """
    root = storage.location
    path = root / HEADER
    try:
        decoded = decode_line(storage.read(HEADER))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"no store at {root} ({HEADER} is missing); expected one that `extract run` made") from None
    if decoded is None:
        raise DamagedStore(f"{path} is damaged; run `python -m features repair {root}`")
    version = decoded[1].get("version")
    if type(version) is int and version > 0 and version != VERSION:
        raise OtherVersion(
            f"{path} has version {version}, written by another program than this one, which reads version {VERSION}; "
            "use that program, or make the store again"
        )
    return decoded[1]


def parse_header(header: Record) -> Description:
    """What the header describes.

    Raises:
        DamagedStore: it describes no store, whatever its checksum says.
    """
    try:
        version = take_count(header, "version")
        if version != VERSION:
            raise MalformedRecord(f"'version' is {version}; expected {VERSION}")
        return Description(_parse_spec(take(header, "spec", dict)), _fingerprint(header), take(header, "format", str))
    except ValueError as error:
        raise DamagedStore(
            f"store.json does not describe a store ({error}); this is not one of ours: encode again into another folder"
        ) from error


def _parse_spec(spec: Record) -> StoreSpec:
    arrays = [
        ArraySpec(take(array, "name", str), tuple(take_all(array, "shape", int)), take(array, "dtype", str))
        for array in take_all(spec, "arrays", dict)
    ]
    for array in arrays:
        stored(array.dtype)
    grid = None if spec.get("grid") is None else take_all(spec, "grid", int)
    if grid is not None and (len(grid) != 2 or min(grid) < 1):
        raise MalformedRecord(f"'grid' is {grid!r:.60}; expected the rows and columns of the patches")
    return StoreSpec(
        take(spec, "kind", str),  # type: ignore[arg-type]  # StoreSpec checks it, and the codec
        tuple(arrays),
        take_count(spec, "shard"),
        None if grid is None else (grid[0], grid[1]),
        take(spec, "codec", str),  # type: ignore[arg-type]
    )


def _fingerprint(header: Record) -> Fingerprint:
    fields = take(header, "fingerprint", dict)
    for name, value in fields.items():
        if not isinstance(value, str | int | float | None):
            raise MalformedRecord(f"'fingerprint' has {name!r} of {type(value).__name__}; expected one plain value")
    return Fingerprint(fields)


def _plain(record: Record) -> Record:
    """As it is when it has been through JSON, so that what repeats a header is the same bytes."""
    return json.loads(json.dumps(record, sort_keys=True))
