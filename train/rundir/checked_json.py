"""Reads and checks JSON files of a run, which people edit and disks damage; faults are reported in a single line."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from egopatch.configs.schema import HeadConfig
from egopatch.configs.wrong_types import reworded
from egopatch.features.io.fields import MalformedRecord, Record, get_count, get_field, get_list

T = TypeVar("T")

# The fields of a card that every command reads, and those that opening or publishing a head requires.
_ALWAYS: Mapping[str, type] = {
    "config": dict,
    "versions": dict,
    "answers": list,
    "fingerprint": dict,
    "text_fingerprint": dict,
    "trained_on": dict,
}
_OF_A_HEAD: Mapping[str, type] = {"model": str, "val": dict, "versions": dict, "command": str}
_COUNTS = ("seed", "best_epoch", "parameters")


def read_object(path: Path) -> Record:
    """Read a JSON object.

    Raises:
        FileNotFoundError, OSError: The file is missing or cannot be read.
        ValueError: It does not hold a JSON object; the message does not name the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise MalformedRecord(f"it holds a {type(value).__name__}; expected an object")
    return value


def typed(kind: type[T], name: str, values: Mapping[str, Any]) -> T:
    """Build the dataclass `kind` from `values`, and check their names and types.

    Raises:
        ValueError: A name is unknown, or a value has another type or is out of range; the message calls it
            `name.OPTION`.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, name)
    try:
        return parser.instantiate(parser.parse_object({name: dict(values)}))[name]
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise ValueError(reworded(" ".join(str(error).split()))) from error


def require_card_fields(card: Record) -> None:
    """Check the fields of `card.json` that the table and the report read; cards of earlier versions lack some.

    Raises:
        MalformedRecord: A field has the wrong type.
    """
    for name, kind in _ALWAYS.items():
        if card.get(name) is not None:
            get_field(card, name, kind)
    if card.get("answers"):
        get_list(card, "answers", str)
    config = card.get("config") or {}
    for section in config:
        get_field(config, section, dict)
    head = config.get("head", {})
    for name, kinds in (("ratio", (int, float)), ("frames", (int,))):
        value = head.get(name)
        if value is not None and (type(value) not in kinds or value <= 0):
            raise MalformedRecord(f"'head.{name}' is {value!r:.60}; expected a number above 0")


def require_head_fields(card: Record) -> None:
    """Check all fields of `card.json` that a head is opened and published with.

    Raises:
        ValueError: A field is missing, has another type or is out of range.
    """
    for name, kind in _OF_A_HEAD.items():
        get_field(card, name, kind)
    for name in _COUNTS:
        get_count(card, name)
    get_list(card, "answers", str)
    config = get_field(card, "config", dict)
    get_field(config, "data", dict)
    get_field(config, "train", dict)
    require_card_fields(card)
    known = {field.name for field in fields(HeadConfig)}
    typed(HeadConfig, "head", {name: value for name, value in get_field(config, "head", dict).items() if name in known})
