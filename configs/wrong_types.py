"""Rewords jsonargparse's errors about unknown names and wrong types, which speak of parser keys and classes."""

import re
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

# An unknown name, in the words of jsonargparse's versions: its section, if they name it, and the option.
_UNKNOWN = re.compile(
    r"Group '([^']+)' does not accept option '([^']+)'|Option '([^']+)' is not accepted|Key '([^']+)' is not expected"
)
_ERROR = re.compile(r"Parser key \"(?P<name>[\w.]+)\"(?: element \d+)?: (?P<types>.+)")
# In this order: the errors of a union hold those of its types.
_VALUES = (
    re.compile(r"Given value type: <class '[\w.]+'> Given value: (.+)"),
    re.compile(r"Got value: (.+)"),
    re.compile(r"(?:with base 10|string to float): '(.+)'"),
    re.compile(r": (\S+) does not conform to restriction"),
)
_END_OF_TYPES = re.compile(r"Given value type: |Got value: ")
_NO_PATH = re.compile(r"(?:os\.PathLike object|returns a str), not '?(\w+)'?$")  # before and since Python 3.12
_TYPE = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>|(?:typing\.)?Literal\[([^\]]+)\]|Not of type (\w+)")
_NUMBER = re.compile(r"-?[\d.]+")
_WORDS = {
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "str": "text",
    "dict": "options by name",
    "Path": "a path",
    "NoneType": "null",
    "PositiveFloat": "a number above 0",
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number of at least 0",
}
_KINDS = {"list": "a list", "dict": "a mapping", "int": "a number", "float": "a number", "bool": _WORDS["bool"]}


def reworded(message: str) -> str:
    """`message` with its part about an unknown name or a wrong type in plain words; unchanged without such a part."""
    message = _UNKNOWN.sub(lambda match: ".".join(filter(None, match.groups())) + " is not an option", message)
    error = _ERROR.search(message)
    if not error:
        return message
    start = f"{message[: error.start()]}{error['name']} is"
    if no_path := _NO_PATH.search(error["types"]):  # the value itself is not in the message
        quoted = ", in quotes" if no_path[1] in ("int", "float", "bool") else ""  # as in a file `dir: 2024`
        return f"{start} {_KINDS.get(no_path[1], no_path[1])}; expected {_WORDS['Path']}{quoted}"
    value = next(filter(None, (pattern.search(message) for pattern in _VALUES)), None)
    if not value:
        return message
    found = value[1]
    types = _END_OF_TYPES.split(error["types"])[0]
    kinds = [kind or literals or restricted for kind, literals, restricted in _TYPE.findall(types)]
    if kinds in (["tuple"], ["list"]):
        expected = f"a list in brackets: '[{listed(found, ',')}]'"
    elif kinds:
        expected = _either([_WORDS.get(kind) or _choice(kind) for kind in kinds])
        expected += ", in quotes" if "str" in kinds else ""  # in a command line every value is text
    else:
        return message
    shown = found if _NUMBER.fullmatch(found) else "null" if found == "None" else repr(found)
    return f"{start} {shown}; expected {expected}"


def listed(values: str, separator: str) -> str:
    """The values in text such as `[1, 2]`, `1,2` or `1 2`, with `separator` between them."""
    return separator.join(filter(None, re.split(r"[\[\],\s]+", values)))


def type_in_words(hint: Any, path: str = _WORDS["Path"]) -> str:
    """The values that a type allows, such as `a whole number or auto`; `path` is the phrase for a path."""
    if get_origin(hint) is Literal:
        return _choice(", ".join(map(str, get_args(hint))))
    if get_origin(hint) is tuple:
        return f"a list in brackets, with {type_in_words(get_args(hint)[0])}"
    if get_origin(hint) is UnionType or get_origin(hint) is Union:
        return _either([type_in_words(kind, path) for kind in get_args(hint)], path)
    return path if hint is Path else _WORDS[hint.__name__]


def _either(words: Iterable[str], path: str = _WORDS["Path"]) -> str:
    """`a or b`, each once; words that another one includes are left out."""
    distinct = list(dict.fromkeys(words))
    included = {narrow for wide, narrow in (("a number", _WORDS["int"]), (path, _WORDS["str"])) if wide in distinct}
    return " or ".join(word for word in distinct if word not in included)


def _choice(literals: str) -> str:
    """The choices of a Literal in words, from the text in its brackets: `'a', 'b'`."""
    plain = literals.replace("'", "")
    return f"one of {plain}" if "," in plain else plain
