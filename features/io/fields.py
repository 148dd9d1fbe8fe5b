"""Fields of JSON records, checked as they are taken out: what lies on a disk may come from anybody."""

from collections.abc import Mapping
from typing import Any, TypeVar

Record = dict[str, Any]
Files = Mapping[str, tuple[int, int]]  # path inside the store -> (bytes, CRC-32)
T = TypeVar("T")

_NAMES = {int: "a whole number", str: "a text", dict: "an object", list: "a list", bool: "true or false"}


class MalformedRecord(ValueError):
    """A record whose checksum may be right, but which lacks a field or holds something else in it."""


def take(record: Record, name: str, kind: type[T]) -> T:
    """The field `name`, exactly of the type `kind`.

    Raises:
        MalformedRecord: it is missing or of another type.
    """
    if not isinstance(record, dict):
        raise MalformedRecord(f"{_shown(record)} stands where an object with {name!r} is expected")
    if name not in record:
        raise MalformedRecord(f"{name!r} is missing")
    value = record[name]
    if type(value) is not kind:
        raise MalformedRecord(f"{name!r} is {_shown(value)}; expected {_NAMES[kind]}")
    return value


def take_count(record: Record, name: str, below: int = 2**63) -> int:
    """A whole number that is not negative and `below` some limit. Errors as in `take`."""
    value = take(record, name, int)
    if not 0 <= value < below:
        raise MalformedRecord(f"{name!r} is {_shown(value)}; expected a number from 0 to {below - 1}")
    return value


def take_all(record: Record, name: str, *kinds: type) -> list[Any]:
    """A list whose items are each of one of `kinds`. Errors as in `take`."""
    values = take(record, name, list)
    if not set(map(type, values)) <= set(kinds):
        value = next(value for value in values if type(value) not in kinds)
        raise MalformedRecord(f"{name!r} holds {_shown(value)}; expected {_NAMES[kinds[0]]}")
    return values


def take_checksum(record: Record, name: str) -> int:
    """A checksum of 32 bits, written as hexadecimal digits. Errors as in `take`."""
    text = take(record, name, str)
    try:
        value = int(text, 16)
    except ValueError:
        value = -1
    if f"{value:08x}" != text:
        raise MalformedRecord(f"{name!r} is {_shown(text)}; expected eight hexadecimal digits")
    return value


def files_to_json(files: Files) -> Record:
    """Files as a record names them."""
    return {name: {"bytes": size, "crc32": f"{crc:08x}"} for name, (size, crc) in files.items()}


def take_files(record: Record, name: str) -> Files:
    """The inverse of `files_to_json`. Errors as in `take`."""
    files = take(record, name, dict)
    return {path: (take_count(entry, "bytes"), take_checksum(entry, "crc32")) for path, entry in files.items()}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
