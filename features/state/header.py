"""`store.json`: the store's spec, fingerprint and file format, written once and with a checksum of its own.

Its version covers everything in the store, journals included. A program refuses stores of other versions, by number,
and changes nothing in them.
"""

import json
import shlex
from dataclasses import asdict, dataclass

from egopatch.features.formats.interface import require_format
from egopatch.features.io.fields import MalformedRecord, Record, get_count, get_field, get_list
from egopatch.features.storage.interface import Storage
from egopatch.features.storage.journal import decode_line, encode_line
from egopatch.features.values.dtypes import disk_dtype
from egopatch.features.values.errors import DamagedStore, NoStore, OtherVersion
from egopatch.features.values.spec import ArraySpec, Fingerprint, StoreSpec

VERSION = 3
HEADER = "store.json"  # its name in the store


@dataclass(frozen=True)
class StoreHeader:
    """The content of a header: the store's spec, its fingerprint, and the name of its file format."""

    spec: StoreSpec
    fingerprint: Fingerprint
    format: str

    def differences(self, requested: "StoreHeader") -> list[str]:
        """One line for each field in which this header and the `requested` one differ, the fingerprint's first."""
        mine, theirs = (
            {"format": header.format}
            | {f"spec.{name}": value for name, value in _as_json(asdict(header.spec)).items() if name != "arrays"}
            for header in (self, requested)
        )
        return [
            *self.fingerprint.differences(requested.fingerprint, "store has", "requested"),
            *(
                f"{name}: store has {mine[name]!r}, requested {theirs[name]!r}"
                for name in sorted(mine)
                if mine[name] != theirs[name]
            ),
            *_array_differences(self.spec, requested.spec),
        ]


def _array_differences(mine: StoreSpec, requested: StoreSpec) -> list[str]:
    """As `StoreHeader.differences`, but for the arrays: `patches: store has int8, requested float32`."""
    stored, wanted = ({array.name: array for array in spec.arrays} for spec in (mine, requested))
    if list(stored) != list(wanted) and stored.keys() == wanted.keys():
        return [f"order of the arrays: store has {', '.join(stored)}, requested {', '.join(wanted)}"]
    lines = []
    for name in stored | wanted:
        pair = (stored.get(name), wanted.get(name))
        if pair[0] != pair[1]:
            shapes = {None if array is None else array.shape for array in pair}
            words = [_array_in_words(array, with_shape=len(shapes) > 1) for array in pair]
            lines.append(f"{name}: store has {words[0]}, requested {words[1]}")
    return lines


def _array_in_words(array: ArraySpec | None, with_shape: bool) -> str:
    if array is None:
        return "no such array"
    return f"{array.dtype} {list(array.shape)}" if with_shape else array.dtype


def header_record(header: StoreHeader) -> Record:
    """The header as JSON values.

    Raises:
        StoreError: An array's dtype is unknown.
    """
    for array in header.spec.arrays:
        disk_dtype(array.dtype)
    return _as_json(
        {
            "version": VERSION,
            "format": header.format,
            "spec": asdict(header.spec),
            "fingerprint": dict(header.fingerprint.fields),
        }
    )


def create_header(storage: Storage, record: Record) -> None:
    """Write the header where none exists."""
    storage.create(HEADER, encode_line(0, record))


def write_header(storage: Storage, record: Record) -> None:
    """Write the header in one step, replacing an existing one."""
    storage.write(HEADER, encode_line(0, record))


def read_header(storage: Storage) -> Record:
    """Read the header as JSON values, for `parse_header`.

    Raises:
        OtherVersion: Another version of this program wrote the store.
        NoStore: The store does not exist.
        DamagedStore: The file is damaged.
    """
    root = storage.location
    path = root / HEADER
    try:
        decoded = decode_line(storage.read(HEADER))
    except (FileNotFoundError, NotADirectoryError):
        raise NoStore(
            f"no store at {root} ({HEADER} is missing); run `extract run` to create one, or, if it was moved, replace "
            "its old path in the config"
        ) from None
    if decoded is None:
        raise DamagedStore(f"{path} is damaged; run `egopatch features repair {shlex.quote(str(root))}`")
    version = decoded[1].get("version")
    if type(version) is int and version > 0 and version != VERSION:
        raise OtherVersion(
            f"{path} has version {version}, but this program reads version {VERSION}; use the program that wrote the "
            "store, or encode it again"
        )
    return decoded[1]


def parse_header(record: Record) -> StoreHeader:
    """The header that `record` holds.

    Raises:
        DamagedStore: The record does not describe a store, even if its checksum is right.
    """
    try:
        version = get_count(record, "version")
        if version != VERSION:
            raise MalformedRecord(f"'version' is {version}; expected {VERSION}")
        spec = _parse_spec(get_field(record, "spec", dict))
        format = get_field(record, "format", str)
        require_format(format, spec.codec)
        return StoreHeader(spec, Fingerprint(get_field(record, "fingerprint", dict)), format)
    except ValueError as error:
        raise DamagedStore(
            f"{HEADER} does not describe a store ({error}); this program did not write it: encode again into another "
            "folder"
        ) from error


def _parse_spec(spec: Record) -> StoreSpec:
    arrays = [
        ArraySpec(get_field(array, "name", str), tuple(get_list(array, "shape", int)), get_field(array, "dtype", str))
        for array in get_list(spec, "arrays", dict)
    ]
    for array in arrays:
        disk_dtype(array.dtype)
    grid = None if spec.get("grid") is None else get_list(spec, "grid", int)
    return StoreSpec(
        get_field(spec, "kind", str),  # type: ignore[arg-type]  # StoreSpec checks kind and codec
        tuple(arrays),
        get_count(spec, "shard"),
        None if grid is None else tuple(grid),
        get_field(spec, "codec", str),  # type: ignore[arg-type]
    )


def _as_json(record: Record) -> Record:
    """`record` after a round trip through JSON, so that every copy of a header has the same bytes."""
    return json.loads(json.dumps(record, sort_keys=True))
