"""Faults of a YAML file that its parser reports badly, each with its line.

YAML loaders silently keep the last of two equal keys, and jsonargparse ends in a traceback over a section without
options and over an alias to a value that contains it. Empty text as a path would be the current folder. Numbers in base
60 and 8 are hardly ever meant.
"""

import itertools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

# Numbers with a colon, in base 60, or with a leading zero, in base 8, if that changes their value.
_OTHER_BASE = re.compile(r"[-+]?([\d_]+(:\d+)+(\.[\d_]*)?|0[0_]*[1-7][0-7_]*[0-7][0-7_]*)")


def find_fault(text: str, sections: Collection[str]) -> str | None:
    """The first fault in the text of an experiment's file, and its place; None if there is none of this kind.

    Args:
        text: The file.
        sections: Names of the keys whose values are mappings.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return f"{where}not valid YAML ({error.problem or error.context})"
    except yaml.YAMLError as error:
        return f"not valid YAML ({' '.join(str(error).split())})"
    expected = "expected sections such as `head: {ratio: 0.5}`"
    if root is None:
        return f"contains no options; {expected}"
    if not isinstance(root, yaml.MappingNode):
        return f"line {root.start_mark.line + 1}: not a mapping; {expected}"
    return (
        _fault_in_values(text, root)
        or _key_that_is_no_name(root)
        or _section_without_options(root, sections)
        or _empty_text(root)
    )


def lines_of_options(text: str) -> dict[str, int]:
    """The line, counted from 1, of each `section.option` and each key without options in an experiment's file."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode), "a file without a fault is a mapping"
    lines = {}
    for section, options in root.value:
        inner = options.value if isinstance(options, yaml.MappingNode) else ()
        lines[section.value] = section.start_mark.line + 1
        lines |= {f"{section.value}.{key.value}": key.start_mark.line + 1 for key, _ in inner}
    return lines


def find_fault_in_value(text: str) -> str | None:
    """As `find_fault`, in the value of one option of a command line; a value that is not YAML is text, without one."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    return _fault_in_values(text, root)


def _fault_in_values(text: str, root: yaml.Node | None) -> str | None:
    """A number that is misread, a value that contains itself, or a key that is used twice; None if there is none."""
    if root is None:
        return None
    return misread_number(text) or _endless_alias(root, set(), set()) or _repeated_in(root)


def misread_number(text: str) -> str | None:
    """The first number that YAML 1.1 reads in base 60 or 8, such as 1:30, which becomes 90, and 010, which becomes 8,
    with its line and what to write; None if there is none.
    """
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.ScalarToken) and token.plain and _OTHER_BASE.fullmatch(token.value):
            number = yaml.safe_load(token.value)
            if isinstance(number, int | float):
                written = f"{token.value} is {number} in YAML; write {number}, or '{token.value}' in quotes for text"
                return f"line {token.start_mark.line + 1}: {written}"
    return None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of plain values.

    Raises:
        ValueError: It is missing, unreadable or not YAML, uses a key twice in one section, or has a value that
            contains itself. The message has the place, without the path.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if fault := _fault_in_values(text, root):
            raise ValueError(fault)
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fault = str(error.strerror) if isinstance(error, OSError) else " ".join(str(error).split())
        raise ValueError(f"cannot be read ({fault}); expected a YAML file") from None


def _endless_alias(node: yaml.Node, around: set[int], finite: set[int]) -> str | None:
    """The line of a value with an alias to itself within it; None if there is none.

    Args:
        node: The value.
        around: Values that contain it.
        finite: Values that are known not to contain themselves.
    """
    if id(node) in around:
        return f"line {node.start_mark.line + 1}: this value contains an alias to itself; write it out"
    if isinstance(node, yaml.CollectionNode) and id(node) not in finite:
        parts = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        for part in parts:
            if found := _endless_alias(part, around | {id(node)}, finite):
                return found
        finite.add(id(node))
    return None


def _repeated_in(node: yaml.Node) -> str | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    seen = set()
    for key, value in pairs:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                return f"line {key.start_mark.line + 1}: key {key.value!r} is used twice; expected each key once"
            seen.add(key.value)
        if found := _repeated_in(value):
            return found
    return None


def _key_that_is_no_name(root: yaml.MappingNode) -> str | None:
    """The line of a key such as `ratio 0.5` or `ratio:0.5`, which lacks the colon or the space after it."""
    for section, options in root.value:
        inner = options.value if isinstance(options, yaml.MappingNode) else ()
        for key in (section, *(option for option, _ in inner)):
            if not key.tag.endswith((":str", ":merge")) or re.search(r"[\s:]", key.value):
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                where = f"line {key.start_mark.line + 1}"
                return f"{where}: {shown} is not a name; expected `NAME: VALUE`, with a space after the colon"
    return None


def _section_without_options(root: yaml.MappingNode, sections: Collection[str]) -> str | None:
    for key, value in root.value:
        if key.value in sections and not isinstance(value, yaml.MappingNode):
            empty = isinstance(value, yaml.ScalarNode) and not value.value
            found = "is empty" if empty else "holds no options"
            expected = f"expected `{key.value}: {{OPTION: VALUE}}`; fill it in, or delete the line"
            return f"line {key.start_mark.line + 1}: section {key.value} {found}; {expected}"
    return None


def _empty_text(root: yaml.MappingNode) -> str | None:
    """The line of an option with empty text, which as a path would be the current folder; None without one."""
    for section, options in root.value:
        for key, value in options.value if isinstance(options, yaml.MappingNode) else ():
            if isinstance(value, yaml.ScalarNode) and value.tag.endswith(":str") and not value.value.strip():
                where = f"line {key.start_mark.line + 1}: {section.value}.{key.value}"
                return f"{where} is empty text; give it a value, or delete the line"
    return None
