"""Turns YAML files and options into a checked `Config`, with one-line errors and help that fits a screen."""

import argparse
import dataclasses
import difflib
import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, get_args

import jsonargparse
import yaml

from egopatch.configs.schema import Config, ConfigError, DataConfig, refusal_of_null
from egopatch.configs.wrong_types import listed, reworded
from egopatch.configs.yaml_faults import find_fault, find_fault_in_value, lines_of_options

_SECTIONS = [section.name for section in dataclasses.fields(Config)]
# Spellings of null in YAML.
_NULLS = ("null", "Null", "NULL", "~")
OPTION_OF_HEAD = "--head.options."
# Numbers that YAML reads in base 60, so that 1:30 becomes 90.
_WITH_COLON = re.compile(r"[-+]?[\d_]+(:\d+)+(\.\d*)?")


def option_names() -> list[str]:
    """Every `section.field` of `Config`, in the order of `configs.schema`."""
    default = Config()
    return [
        f"{section}.{option.name}" for section in _SECTIONS for option in dataclasses.fields(getattr(default, section))
    ]


class ConfigParser(jsonargparse.ArgumentParser):
    """jsonargparse's parser without abbreviations, with one-line errors that name the nearest option or file.

    Attributes:
        read_first: Options that the command reads with `take_option`, because sections have the same names: name -> the
            word for its value, and its help.
    """

    read_first: Mapping[str, tuple[str, str]] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With abbreviations, `--train.epoch 3` would mean `--train.epochs 3`.
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._given: set[str] = set()  # names of the options in the command line
        self._places: dict[str, str] = {}  # option that only the file sets -> file and line

    @property
    def typed(self) -> str:
        """The command as users type it in any folder, such as `egopatch train fit` for `train fit`; for messages."""
        return f"egopatch {self.prog.removeprefix('egopatch ')}"

    @property
    def takes_config(self) -> bool:
        """Whether it has `--config` and the other options of `add_config_arguments`."""
        return "--config" in self._option_string_actions

    def parse_args(self, args: Sequence[str], *more: Any, **options: Any) -> jsonargparse.Namespace:  # type: ignore[override]
        """Parse as jsonargparse does, but let options override the file wherever `--config` stands, and refuse four
        values: empty text, which as a path would be this folder; a null that the option cannot take, which as a path
        would be the folder `null`; 1:30 for a number; and YAML with a fault.
        """
        args = _config_first(args) if self.takes_config else args
        own = set(option_names()) if self.takes_config else set()
        self._given, self._places = {arg.partition("=")[0][2:] for arg in args if arg.startswith("--")}, {}
        last = ""  # the option that the values belong to; some, such as `--seeds`, have several
        of_head: dict[str, str] = {}  # `--head.options.NAME VALUE`, which jsonargparse leaves as text
        for before, arg in itertools.pairwise(["", *args]):
            last = arg.partition("=")[0] if arg.startswith("--") else last
            name, _, value = arg.partition("=") if arg.startswith("--") else (before, "", arg)
            if name.startswith("--") and not value and (arg.endswith("=") or not arg):
                self.error(f"{name} is empty; expected a value")
            if value in _NULLS and name[2:] in own and (refusal := refusal_of_null(name[2:])):
                self.error(refusal)
            if _WITH_COLON.fullmatch(value) and _takes_number(self._option_string_actions.get(last)):
                self.error(f"{last} is {value!r}; expected a number without a colon")
            # Lists and mappings, and options of heads from outside, whose types are not known here, are read as YAML.
            if own and name.startswith(OPTION_OF_HEAD):
                of_head[name.removeprefix(OPTION_OF_HEAD)] = value
            in_section = own and name.startswith("--") and name[2:].partition(".")[0] in _SECTIONS
            as_yaml = in_section and (value[:1] in ("{", "[") or name.startswith(OPTION_OF_HEAD))
            if as_yaml and (fault := find_fault_in_value(value)):
                self.error(f"{name}: {fault}")
            if getattr(self._option_string_actions.get(last), "nargs", None) == "+" and re.search(r"[,\s]", value):
                self.error(f"{last} is {value!r}; several values are separated by spaces: {last} {listed(value, ' ')}")
        namespace = super().parse_args(args, *more, **options)
        for name, value in of_head.items():
            if namespace.head.options.get(name) == value:
                namespace.head.options[name] = _as_yaml(value)
        return namespace

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        """Read a config file as jsonargparse does, and report a fault with the file's name and the line."""
        if not Path(path).is_file():  # a pipe, such as `<(...)` of a shell
            self.error(f"--config {path}: is a pipe, and a config is read several times; expected a YAML file")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            self.error(
                f"--config {path}: not UTF-8 text at byte {error.start}; expected the YAML file of an experiment"
            )
        if fault := find_fault(text, _SECTIONS):
            self.error(f"--config {path}: {fault}")
        self._places = {
            option: f"--config {path}: line {line}: "
            for option, line in lines_of_options(text).items()
            if self._given.isdisjoint((option, option.partition(".")[0]))
        }
        return super().parse_path(path, *args, **kwargs)

    def parse_string(self, *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        """Read a config as jsonargparse does, and refuse one from the command line that has a fault."""
        # `parse_path` has checked a file's text, which is passed by a keyword whose name depends on the version.
        if args and (fault := find_fault(args[0], _SECTIONS)):
            self.error(f"--config: {fault}")
        return super().parse_string(*args, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The command's own options, and the names of the experiment's, by section; `full_help` has all 300 lines."""
        own = [action for action in self._actions if action.dest.partition(".")[0] not in _SECTIONS]
        if not self.takes_config:
            dests = [action.dest for action in self._actions]
            # `--video FILE`, which jsonargparse adds to the options of a section, is not for a command line.
            own = [action for action in self._actions if not any(dest.startswith(f"{action.dest}.") for dest in dests)]
        shown = [action for action in own if action.help != argparse.SUPPRESS]
        lines = [self._usage_line(), "", str(self.description), "", *self._items_read_first()]
        for action in shown:
            lines += _item(_usage_of(action), _help_of(action))
        if self.epilog:
            lines += ["", *textwrap.wrap(self.epilog, 100)]
        if not self.takes_config:
            return "\n".join(lines) + "\n"
        lines += ["", "Options of the experiment, as in --head.ratio 0.5; each overrides the value in the file:"]
        for section in _SECTIONS:
            names = [name.partition(".")[2] for name in option_names() if name.startswith(f"{section}.")]
            lines += _item(f"--{section}.", ", ".join(names))
        return "\n".join([*lines, "", "--help-all describes each of them."]) + "\n"

    def full_help(self) -> str:
        """The help of every option."""
        # The usage of argparse lists all of them first.
        _, description, described = super().format_help().split("\n\n", 2)
        described = re.sub(r"type:\s+<function (\w+) at \w+>", r"type: \1", described)
        parts = [self._usage_line(), description, "\n".join(self._items_read_first()), described]
        return "\n\n".join(filter(None, parts))

    def _items_read_first(self) -> list[str]:
        items = (_item(f"{option} {value}", help) for option, (value, help) in self.read_first.items())
        return list(itertools.chain.from_iterable(items))

    def _usage_line(self) -> str:
        usage = self.usage or ("--config FILE [options]" if self.takes_config else "[options]")
        return f"usage: {self.typed} {usage}"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `message` with the nearest valid option or file and exit with code 2."""
        print(f"{self.prog}: error: {self.explain(message)}", file=sys.stderr)
        raise SystemExit(2)

    def explain(self, message: str) -> str:
        """An error in one line: which option, where the file sets it, its value, what was expected, and the nearest
        valid option or file.
        """
        line = reworded(" ".join(message.split()))
        if absent := line.partition(" arguments are required: ")[2]:
            names = ", ".join(self._name_of(dest) for dest in absent.split(", "))
            return f"missing {names}; `{self.typed} --help` describes it"
        # Name the command's own options as users type them, not as in Python.
        line = re.sub(r"^(\w+)(?= is )", lambda match: self._name_of(match[1]), line)
        place = self._places.get(line.partition(" ")[0], "")
        return _absent_file(line) or _value_of_section(line) or f"{place}{line}{self._nearest(line)}"

    def _name_of(self, dest: str) -> str:
        """The name on the command line of the option or argument that is called `dest` in Python."""
        action = next((action for action in self._actions if action.dest == dest), None)
        if action is None:
            return dest
        return action.option_strings[0] if action.option_strings else str(action.metavar or dest.upper())

    def _nearest(self, message: str) -> str:
        """The end of an error about an unknown name: the nearest known one, or the sections of an experiment."""
        if self.takes_config and (file := re.search(r"unrecognized arguments: ([^-]\S*\.ya?ml)", message)):
            return f"; did you mean --config {file[1]}?"
        if re.search(r"unrecognized arguments: [^-]", message):
            taken = [_usage_of(action) for action in self._actions if not action.option_strings]
            return "".join(f"; expected one {value} at a time, in quotes if it has spaces" for value in taken[:1])
        unknown = re.search(r"unrecognized arguments: --([\w.\-]+)|(\S+) is not an option$", message)
        if not unknown:
            return ""
        name = unknown[1] or unknown[2]
        own = {
            option.removeprefix("--"): option
            for option in self._option_string_actions
            if not re.search(r"\.|^-\w|^--print", option) and option.removeprefix("--") not in _SECTIONS
        } | {option.removeprefix("--"): option for option in self.read_first}
        known = [*(option_names() if self.takes_config else ()), *own]
        if name in known:
            return "; options stand before --"
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
            return f"; did you mean {own.get(close[0], close[0])}?"
        return (
            f"; the sections are {', '.join(_SECTIONS)}"
            if self.takes_config
            else f"; the options are {', '.join(own.values())}"
        )


class StageParser(ConfigParser):
    """The parser of a command of a stage: every command has `--json`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--json", action="store_true", help="print JSON")


def _config_first(args: Sequence[str]) -> list[str]:
    """The command line with each `--config FILE` before all else; jsonargparse lets the last one on the line win."""
    end = args.index("--") if "--" in args else len(args)
    first: list[str] = []
    rest: list[str] = []
    for before, arg in itertools.pairwise(["", *args[:end]]):
        (first if "--config" in (before, arg) or arg.startswith("--config=") else rest).append(arg)
    return [*first, *rest, *args[end:]]


def _as_yaml(text: str) -> Any:
    """The value that `text` is in YAML; the text itself if it is not YAML."""
    try:
        return jsonargparse.get_loader("yaml")(text)
    except yaml.YAMLError:
        return text


def _takes_number(action: argparse.Action | None) -> bool:
    hint = getattr(action, "_typehint", None)
    return any(isinstance(kind, type) and issubclass(kind, int | float) for kind in get_args(hint) or (hint,))


class _FullHelp(argparse.Action):
    """`--help-all`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, ConfigParser)
        print(parser.full_help(), end="")
        parser.exit()


def _usage_of(action: argparse.Action) -> str:
    """An argument as users type it, with a word for its value."""
    choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""
    value = str(action.metavar or choices or action.dest.rpartition(".")[2].upper())
    if not action.option_strings:
        return value
    return ", ".join(action.option_strings) + (f" {value}" if action.nargs != 0 else "")


def _help_of(action: argparse.Action) -> str:
    """An argument's help, and its default if that is a number or text that the help does not mention."""
    text = " ".join((action.help or "").split())
    if isinstance(action.default, bool) or not isinstance(action.default, int | float | str) or "default" in text:
        return text
    return text if action.default == argparse.SUPPRESS else f"{text.removesuffix('.')} (default: {action.default})"


def _item(name: str, text: str) -> list[str]:
    """Lines with a name and its help, beside the name or, if that is long, below it."""
    wrapped = [" " * 24 + line for line in textwrap.wrap(text, 76, break_long_words=False)]
    if wrapped and len(name) < 20:
        return [f"  {name:<22}{wrapped[0].lstrip()}", *wrapped[1:]]
    return [f"  {name}", *wrapped]


def _absent_file(message: str) -> str | None:
    """An error about `--config`, with the nearest file; None if the message is about something else."""
    absent = re.search(r"\"config\": (File does not exist|Path is not a file): '(.+)'", message)
    if not absent:
        return None
    given, path = absent[2], Path(absent[2])
    # `Path` drops a slash at the end, with which a file's name becomes that of a missing folder.
    if path.is_file():
        return f"--config is {given!r}, which ends in a slash; did you mean {path}?"
    fault = "does not exist" if absent[1] == "File does not exist" else "is not a file"
    # Compared without the suffix, which would make all short names similar.
    files = {file.stem: file for file in path.parent.glob("*.yaml") if file.is_file()}
    close = difflib.get_close_matches(path.stem, files, n=1)
    expected = "expected the YAML file of an experiment; examples are in configs/"
    return f"--config is {str(path)!r}, which {fault}; " + (f"did you mean {files[close[0]]}?" if close else expected)


def _value_of_section(message: str) -> str | None:
    """An error about a value such as `--encoder 3`; None if the message is about something else."""
    loaded = re.search(r"\"(\w+)\": Unable to load config '(.*)' - Parser key", message)
    if not loaded or loaded[1] not in _SECTIONS:
        return None
    first = next(name for name in option_names() if name.startswith(f"{loaded[1]}."))
    return (
        f"--{loaded[1]} is {loaded[2]!r}, but {loaded[1]} is a section; expected one of its options, such as "
        f"--{first} VALUE, or a YAML file with its options"
    )


def add_config_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Add `--config FILE`, `--print_config` and every option of `Config` to `parser`."""
    parser.add_argument("--config", action="config", help="YAML file of an experiment")
    parser.add_argument(
        "--help-all", action=_FullHelp, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
        help="describe every option of the experiment and exit",
    )  # fmt: skip
    parser.add_class_arguments(Config)


def take_option(args: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The value of `option` in a command line, None if it is absent, and the command line without it.

    For options such as `--run`, which jsonargparse takes for the section of that name.

    Raises:
        ConfigError: `option` has no value, or an empty one.
    """
    for place, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name == option:
            after = place + (1 if equals else 2)
            if not equals and (after > len(args) or args[place + 1].startswith("--")):
                raise ConfigError(f"{option} has no value; expected one after it")
            value = value if equals else args[place + 1]
            if not value:
                raise ConfigError(f"{option} is empty; expected a value")  # which as a path would be this folder
            return value, [*args[:place], *args[after:]]
    return None, list(args)


def parse_config(parser: ConfigParser, args: Sequence[str]) -> tuple[Config, jsonargparse.Namespace]:
    """Parse a command line with the options of `parser`, `--config` and every option of `Config`.

    Returns and raises:
        As `parse_options`; a command line with none of `--config`, `--data.root` and `--run.table` is refused
        as well.
    """
    config, namespace = parse_options(parser, args)
    if not namespace.config and config.data.root == DataConfig.root and config.run.table is None:
        # Hardly anybody wants the experiment that the defaults alone describe.
        parser.error("no --config; expected --config FILE, the YAML file of an experiment; examples are in configs/")
    return config, namespace


def parse_options(parser: ConfigParser, args: Sequence[str]) -> tuple[Config, jsonargparse.Namespace]:
    """Parse a command line as `parse_config` does, with or without `--config`.

    Returns:
        The experiment, and the namespace with all other options of `parser`.

    Raises:
        SystemExit: An unknown key, a wrong type, a value out of range or a missing file; the exit code is 2, and stderr
            has one line.
    """
    if not parser.takes_config:  # a command may parse several lines with one parser
        add_config_arguments(parser)
    namespace = parser.parse_args(list(args))
    try:
        found = parser.instantiate(namespace)
        return Config(**{name: found[name] for name in _SECTIONS}), namespace
    except ValueError as error:
        parser.error(str(error))


def load_config(path: Path | str, overrides: Sequence[object] = ()) -> Config:
    """Read one experiment file; `overrides` are options like `["--head.ratio", 0.5]`.

    Raises:
        ConfigError: The file is missing or not an experiment's, or an option has an unknown name or a wrong value.
    """
    if not isinstance(path, Path | str):
        raise ConfigError(f"path is {path!r:.60}; expected the YAML file of an experiment, such as 'mine.yaml'")
    if isinstance(overrides, str | Mapping) or not isinstance(overrides, Iterable):
        raise ConfigError(f'overrides is {overrides!r}; expected a list such as ["--head.ratio", "0.5"]')
    try:
        return parse_config(_ParserInPython(prog="config"), ["--config", str(path), *map(str, overrides)])[0]
    except _Refusal as refusal:
        raise ConfigError(str(refusal)) from None


class _Refusal(BaseException):
    """What is wrong with a config, in one line; jsonargparse would catch an Exception and explain it once more."""


class _ParserInPython(ConfigParser):
    """Raises errors instead of printing them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _Refusal(self.explain(message))
