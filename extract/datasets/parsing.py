"""Reading annotation files, with every fault reported as one line that names its file and position."""

import codecs
import csv
import difflib
import io
import json
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from egopatch.extract.datasets.records import DatasetError
from egopatch.features.io.fields import garbage_collection_paused
from egopatch.features.io.lfs import pointer_fault

T = TypeVar("T")

# A clip id becomes a file name such as `ID.mp4`, and file systems allow 255 bytes.
MAX_CLIP_ID_BYTES = 240
MAX_NAME_BYTES = 255
# Text with these can be neither a path, nor an array's value, nor UTF-8 output.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
USABLE = "text without NUL or lone surrogates"
_NO_NAMES = frozenset(("", ".", ".."))  # these cannot name a file
# Spreadsheets separate cells by one of these, depending on the language; the header's most frequent one is used.
_DELIMITERS = ",;\t"
MAX_SHOWN = 200  # characters of a wrong header


def read_text(path: Path, purpose: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        DatasetError: The file is missing, unreadable or not UTF-8; the message contains `purpose`.
    """
    try:
        with _readable(path, purpose):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}:byte {error.start}: not UTF-8 text; expected {purpose}: save it as UTF-8") from None


@contextmanager
def _readable(path: Path, purpose: str) -> Iterator[None]:
    """Turn errors of opening a file into a DatasetError that contains `purpose`."""
    if "\0" in str(path):
        raise DatasetError(f"{str(path)!r}: no file can have this name; expected {purpose}")
    try:
        if fault := pointer_fault(path):
            raise DatasetError(f"{path}: {fault}")
        yield
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; expected {purpose}") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); expected {purpose}") from None


def _read_json(path: Path, purpose: str) -> Any:
    """The value in a JSON file, with a ValueError in place of each object that repeats a key.

    Raises:
        DatasetError: As `read_text`; or the file is not JSON (with line and column).
    """
    text = read_text(path, purpose)
    try:
        with garbage_collection_paused():
            return _loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}:line {error.lineno} column {error.colno}: not valid JSON ({error.msg}); "
            "the file may be truncated, download it again"
        ) from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or deeply nested lists
        raise DatasetError(f"{path}: cannot be parsed as JSON ({error}); expected {purpose}") from None


def read_json_records(path: Path, purpose: str) -> list[tuple[str, Any]]:
    """Position (`FILE:record N`, from 1 on) and value of each record of the list in a JSON file.

    A record with a repeated key is replaced by a ValueError, which `collect` reports.

    Raises:
        DatasetError: As `read_text`; the file is not JSON (with line and column), or not a list.
    """
    records = _read_json(path, purpose)
    if not isinstance(records, list):
        raise DatasetError(f"{path}: contains a JSON {kind(records)}; expected a list of question records")
    return [(f"{path}:record {number}", record) for number, record in enumerate(records, start=1)]


def read_json_object(path: Path, purpose: str, expected: str) -> dict[str, Any]:
    """The JSON object of a file, such as one published beside the annotations.

    Args:
        path: The file.
        purpose: What it holds, for an error.
        expected: What the object maps, for an error, such as "indices by q_uid".

    Raises:
        DatasetError: As `read_text`; or the file is not JSON, not an object, or repeats a key.
    """
    found = _read_json(path, purpose)
    if isinstance(found, ValueError):
        raise DatasetError(f"{path}: {found}")
    if not isinstance(found, dict):
        raise DatasetError(f"{path}: contains a JSON {kind(found)}; expected an object of {expected}")
    return found


def csv_rows(path: Path, purpose: str, columns: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Position (`FILE:LINE` of its first line) and cells by column of every row of a CSV file that is not empty.

    A row with more cells than the header is a ValueError. Commas, semicolons or tabs may separate cells.

    Raises:
        DatasetError: As `read_text`; or the header, line 1, lacks one of `columns`, repeats a column or does not name
            one that has values; or a quotation mark is not closed, or is not doubled inside a quoted cell.
    """
    text = read_text(path, purpose)
    header = text.partition("\n")[0]
    reader, line = csv.reader(io.StringIO(text), delimiter=max(_DELIMITERS, key=header.count), strict=True), 1
    try:
        names = next(reader, [])
        if missing := [column for column in columns if column not in names]:
            found = repr(names)[1:-1][:MAX_SHOWN] or "nothing"
            raise DatasetError(
                f"{path}:1: lacks the columns {', '.join(missing)}; expected {', '.join(columns)}; found {found}"
            )
        named = [column for column in names if column]
        if twice := [column for column in dict.fromkeys(named) if named.count(column) > 1]:
            raise DatasetError(f"{path}:1: column {twice[0]!r} is used twice; expected each column once in the header")
        line = reader.line_num + 1
        for cells in reader:
            more = f"has more cells than the header, which has {len(names)}"
            for place, (name, cell) in enumerate(zip(names, cells), start=1):
                if cell and not name:
                    raise DatasetError(
                        f"{path}:1: column {place} has no name, but line {line} has {cell!r} there; name the column, "
                        "or remove it (with pandas: `to_csv(FILE, index=False)`)"
                    )
            if any(cells):
                yield f"{path}:{line}", ValueError(more) if len(cells) > len(names) else dict(zip(names, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(
            f"{path}:{line}: not valid CSV ({error}); expected {purpose}, and quotation marks inside quoted cells "
            "doubled"
        ) from None


def json_lines(path: Path, purpose: str) -> Iterator[tuple[str, Any]]:
    """Position (`FILE:LINE`) and value of every line that is not blank; the value of a malformed line is a ValueError.

    The file is read line by line, because it may have millions of lines.

    Raises:
        DatasetError: The file is missing or unreadable; the message contains `purpose`.
    """
    name = str(path)
    with _readable(path, purpose), path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                yield f"{name}:1", ValueError("is UTF-16 text, as some editors save it; save the file as UTF-8")
                return
            if line.strip():
                yield f"{name}:{number}", _json_line(line, "utf-8-sig" if number == 1 else "utf-8")


def _json_line(line: bytes, encoding: str) -> Any:
    try:
        return _loads(line.decode(encoding).rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 text (byte {error.start} of the line); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return ValueError(f"not valid JSON ({error.msg} at column {error.colno}); expected one object on the line")
    except (ValueError, RecursionError) as error:
        return ValueError(f"cannot be parsed as JSON ({error}); expected one flat object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | ValueError:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
    return ValueError(f"key {twice!r} is used twice in one object; expected each key once")


# Parses a JSON text; an object with a repeated key becomes a ValueError, which `collect` reports. `json.loads` would
# make a decoder for every line, which takes as long as decoding it.
_loads: Callable[[str], Any] = json.JSONDecoder(object_pairs_hook=_object).decode


def collect(
    records: Iterable[tuple[str, Any]], parse: Callable[[Any], T], problems: list[str]
) -> Iterator[tuple[str, T]]:
    """`parse` every record; a ValueError is added to `problems` as `position: reason`, and the record is skipped."""
    for position, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            yield position, parse(record)
        except ValueError as error:
            problems.append(f"{position}: {error}")


def collect_unique(
    records: Iterable[tuple[str, Any]],
    parse: Callable[[Any], T],
    problems: list[str],
    key: str,
    id_of: Callable[[T], str] = attrgetter("question_id"),
) -> Iterator[tuple[str, T]]:
    """As `collect`; a record with the id of an earlier one is added to `problems` and skipped, too.

    `key` is what the records call their id, for messages, and `id_of` gives the id of what `parse` returns.
    """
    seen: set[str] = set()
    for position, value in collect(records, parse, problems):
        name = id_of(value)
        if name in seen:
            problems.append(f"{position}: {key} {name!r} is used twice; expected unique ids")
            continue
        seen.add(name)
        yield position, value


def kind(value: object) -> str:
    """JSON's name for the type of a value, for messages."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    names[ValueError] = "object"  # with a repeated key
    return names.get(type(value), type(value).__name__)


def as_object(record: object, allowed: Collection[str] | None = None) -> Mapping[str, Any]:
    """`record` as a JSON object; keys that are not in `allowed` are refused with the nearest valid name."""
    if not isinstance(record, dict):
        raise ValueError(f"contains a {kind(record)}; expected an object")
    for key in record:
        if allowed is not None and key not in allowed:
            raise ValueError(f"unknown key {key!r}; {_nearest_key(key, tuple(allowed))}")
    return record


@lru_cache(maxsize=64)  # a file may have the same wrong key in each of a million lines
def _nearest_key(key: str, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(allowed)}"


def text_field(record: Mapping[str, Any], key: str) -> str:
    """A string that is not blank."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} is {_shown(record, key)}; expected text")
    _require_usable(record, key, value)
    return value


def answer_field(record: Mapping[str, Any], key: str) -> str:
    """Text that is not blank, or a number as text: `3` is an answer like `"3"`.

    The text is normalised to Unicode's form NFC, so that an answer is one class whichever form an editor wrote.
    """
    value = record.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    return unicodedata.normalize("NFC", text_field(record, key))


def id_field(record: Mapping[str, Any], key: str) -> str:
    """A string or a whole number, as a string."""
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key!r} is {_shown(record, key)}; expected a string or a whole number")
    _require_usable(record, key, value)
    return value


def path_field(record: Mapping[str, Any], key: str) -> str:
    """The path of a file, with names that a file system can have."""
    value = text_field(record, key)
    if len(value.encode()) <= MAX_NAME_BYTES:
        return value
    if (longest := max(len(name.encode()) for name in value.split("/"))) > MAX_NAME_BYTES:
        raise ValueError(f"{key!r} has a name of {longest} bytes; expected at most {MAX_NAME_BYTES}")
    return value


def clip_id_field(record: Mapping[str, Any], key: str) -> str:
    """A clip id that is safe as a file name."""
    value = text_field(record, key)
    if "/" in value or "\\" in value or value in (".", "..") or not value.isprintable():
        raise ValueError(f"{key!r} is {value!r}; expected a name without slashes or control characters")
    return _short_id(key, value)


def clip_path_field(record: Mapping[str, Any], key: str) -> str:
    """A clip id that is safe as the path of a file, such as `P01/P01_01`."""
    value = text_field(record, key)
    if "\\" in value or not value.isprintable() or not _NO_NAMES.isdisjoint(value.split("/")):
        raise ValueError(f"{key!r} is {value!r}; expected names joined by single slashes, such as P01/P01_01")
    return _short_id(key, value)


def _short_id(key: str, value: str) -> str:
    if len(value.encode()) > MAX_CLIP_ID_BYTES:
        raise ValueError(f"{key!r} has {len(value.encode())} bytes; expected at most {MAX_CLIP_ID_BYTES}")
    return sys.intern(value)  # many questions are about one clip


def seconds_field(record: Mapping[str, Any], key: str) -> float | None:
    """A finite number of seconds; None if the key is missing or null."""
    value = record.get(key)
    if value is None or (type(value) is float and math.isfinite(value)):
        return value
    try:
        seconds = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # a whole number of hundreds of digits
        seconds = math.inf
    if not math.isfinite(seconds):
        raise ValueError(f"{key!r} is {_shown(record, key)}; expected a number of seconds or null")
    return seconds


def texts_field(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of strings; a single string counts as a list of one, a missing key as an empty list."""
    value = record.get(key)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise ValueError(f"{key!r} is {_shown(record, key)}; expected a list of strings")
    for item in values:
        _require_usable(record, key, item)
    return tuple(values)


def compared(name: str) -> str:
    """A key that is equal for names that differ only in case, surrounding spaces or the Unicode form of a letter."""
    return unicodedata.normalize("NFC", name.strip().casefold())


def is_usable(text: str) -> bool:
    """Whether a text has neither NUL nor lone surrogates."""
    return text.isprintable() or not _UNUSABLE.search(text)


def _require_usable(record: Mapping[str, Any], key: str, text: str) -> None:
    if not is_usable(text):
        raise ValueError(f"{key!r} is {_shown(record, key)}; expected {USABLE}")


def _shown(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        return "missing"
    text = repr(record[key])
    return text if len(text) <= 60 else f"{text[:57]}..."
