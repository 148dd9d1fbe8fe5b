"""Reading JSON records by the thousand, every field checked: a file on a disk may come from anybody."""

import gc
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

Record = dict[str, Any]
FileSum = tuple[int, int]  # bytes, CRC-32
FileSums = Mapping[str, FileSum]  # path inside the store -> size and checksum
T = TypeVar("T")

_NAMES = {
    int: "a whole number",
    float: "a decimal number",
    str: "a text",
    dict: "an object",
    list: "a list",
    bool: "true or false",
}


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause garbage collection while many objects are created and all are kept: it would double the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


class MalformedRecord(ValueError):
    """A record in which a field is missing or has an unexpected value, even if its checksum is right."""


def get_field(record: Record, name: str, kind: type[T]) -> T:
    """The field `name`, exactly of the type `kind`.

    Raises:
        MalformedRecord: The field is missing or has another type.
    """
    if not isinstance(record, dict):
        raise MalformedRecord(f"found {_shortened(record)}; expected an object with {name!r}")
    if name not in record:
        raise MalformedRecord(f"{name!r} is missing")
    value = record[name]
    if type(value) is not kind:
        raise MalformedRecord(f"{name!r} is {_shortened(value)}; expected {_NAMES[kind]}")
    return value


def get_count(record: Record, name: str) -> int:
    """A whole number from 0 to 2^63 - 1. Errors as in `get_field`."""
    value = get_field(record, name, int)
    if not 0 <= value < 2**63:
        raise MalformedRecord(f"{name!r} is {_shortened(value)}; expected a number from 0 to {2**63 - 1}")
    return value


def get_list(record: Record, name: str, *kinds: type) -> list[Any]:
    """A list in which every item has one of the types `kinds`. Errors as in `get_field`."""
    values = get_field(record, name, list)
    if not set(map(type, values)) <= set(kinds):
        value = next(value for value in values if type(value) not in kinds)
        raise MalformedRecord(f"{name!r} holds {_shortened(value)}; expected {_NAMES[kinds[0]]}")
    return values


def get_checksum(record: Record, name: str) -> int:
    """A 32-bit checksum, written as hexadecimal digits. Errors as in `get_field`."""
    text = get_field(record, name, str)
    if not re.fullmatch("[0-9a-f]{8}", text):
        raise MalformedRecord(f"{name!r} is {_shortened(text)}; expected eight hexadecimal digits")
    return int(text, 16)


def file_sums_to_json(files: FileSums) -> Record:
    """`files` as a record holds them."""
    return {name: {"bytes": size, "crc32": f"{crc:08x}"} for name, (size, crc) in files.items()}


def get_file_sums(record: Record) -> FileSums:
    """The field `files`, as `file_sums_to_json` writes it. Errors as in `get_field`."""
    files = get_field(record, "files", dict)
    return {path: (get_count(entry, "bytes"), get_checksum(entry, "crc32")) for path, entry in files.items()}


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
