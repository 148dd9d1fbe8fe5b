"""A value of the wrong type, in words: jsonargparse's errors speak of parser keys, unions and classes of Python."""

import re

_ERROR = re.compile(r"Parser key \"(?P<name>[\w.]+)\"(?: element \d+)?: (?P<types>.+)")
_VALUE = re.compile(
    r"(?:Got value: |Given value: )(.+)"  # of a class, and of a union of them
    r"|(?:with base 10|string to float): '(.+)'"
    r"|: (\S+) does not conform to restriction"
)
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


def reworded(message: str) -> str:
    """`message` with its part about a wrong type in words; as it is where it has none that is understood."""
    error, value = _ERROR.search(message), _VALUE.search(message)
    if not error or not value:
        return message
    found = next(filter(None, value.groups()))
    types = error["types"].partition("Given value type: ")[0]
    kinds = [kind or literals or restricted for kind, literals, restricted in _TYPE.findall(types)]
    if kinds == ["tuple"]:
        expected = f"a list in brackets: '[{found}]'"
    elif kinds:
        expected = " or ".join(dict.fromkeys(_WORDS.get(kind) or _choice(kind) for kind in kinds))
    else:
        return message
    shown = found if _NUMBER.fullmatch(found) else repr(found)
    return f"{message[: error.start()]}{error['name']} is {shown}; expected {expected}"


def _choice(literals: str) -> str:
    """What is in the brackets of a Literal: `'a', 'b'`."""
    plain = literals.replace("'", "")
    return f"one of {plain}" if "," in plain else plain
