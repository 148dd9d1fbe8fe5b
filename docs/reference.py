"""The reference of every option and command, from the dataclasses and the command lines themselves.

`python docs/reference.py FOLDER` writes the pages; `make docs` puts them on the site. An option or a command without a
description is an error, so that the reference is always whole.
"""

import argparse
import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import docstring_parser

import egopatch
from egopatch import __main__ as egopatch_main
from egopatch.configs.command_line import StageParser
from egopatch.configs.schema import Config
from egopatch.extract import __main__ as extract
from egopatch.features import __main__ as features
from egopatch.features.commands.shared import CommandParser
from egopatch.train import __main__ as train

PACKAGE = Path(egopatch.__file__).parent
COMMON = {"-h", "--help", "--help-all", "--print_config"}
STAGES: dict[str, tuple[ModuleType, type[argparse.ArgumentParser]]] = {
    "extract": (extract, StageParser),
    "features": (features, CommandParser),
    "train": (train, StageParser),
}


class Undocumented(ValueError):
    """An option or a command has no description."""


def pages() -> dict[str, str]:
    """File name to Markdown."""
    return {"reference/config.md": config_page(), "reference/commands.md": commands_page()}


def config_page() -> str:
    """Every section and option of an experiment's YAML file."""
    lines = [
        "# Options of a config",
        "",
        "An option `ratio` of the section `head` is `head: {ratio: 0.25}` in a YAML file and `--head.ratio 0.25` on "
        "the command line of every command that takes `--config`. Options that a file omits have these defaults.",
    ]
    for section in dataclasses.fields(Config):
        lines += _section(section.name, type(getattr(Config(), section.name)))
    return "\n".join(lines) + "\n"


def _section(name: str, schema: type) -> Iterator[str]:
    parsed = docstring_parser.parse(schema.__doc__ or "")
    about = {param.arg_name: param.description for param in parsed.params}
    hints = get_type_hints(schema)
    yield from ("", f"## {name}", "", str(parsed.short_description), "", "| option | values | default | meaning |")
    yield "|---|---|---|---|"
    for option in dataclasses.fields(schema):
        if not (description := about.get(option.name)):
            raise Undocumented(f"{schema.__name__} does not describe {option.name}; add it to the docstring's Args")
        default = getattr(schema(), option.name)
        cells = (f"`{name}.{option.name}`", _type(hints[option.name]), _code(_yaml(default)), _cell(description))
        yield f"| {' | '.join(cells)} |"


def _type(hint: Any) -> str:
    """A type as a reader of YAML knows it."""
    text = getattr(hint, "__name__", "") if isinstance(hint, type) and not getattr(hint, "__args__", ()) else str(hint)
    text = re.sub(r"(typing|pathlib)\.|<class '([\w.]+)'>", r"\2", text)
    text = re.sub(r"tuple\[(.+), \.\.\.\]", r"list of \1", text)
    for python, plain in (("NoneType", "null"), ("None", "null"), ("str", "text"), ("Path", "path")):
        text = re.sub(rf"\b{python}\b", plain, text)
    text = re.sub(r"Literal\[([^]]*)\]", lambda found: found[1].replace("'", "").replace(", ", " \\| "), text)
    return re.sub(r"(?<!\\)\|", "\\|", text).replace("dict[text, Any]", "names and values")


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", "\\|", " ".join(text.split()))


def commands_page() -> str:
    """Every command with its own options."""
    lines = [
        "# Commands",
        "",
        "In a checkout, `python -m extract`, `python -m features` and `python -m train` work as well. Exit codes: 0 "
        "done; 1 the work failed or found faults; 2 wrong usage or config. Commands with `--config` also take every "
        "[option of a config](config.md).",
    ]
    parsers_by_stage = command_parsers()
    lines += ["", "## egopatch", "", "| command | what it does |", "|---|---|"]
    for name, about in egopatch_main.COMMANDS.items():
        stage = egopatch_main.SHORT.get(name)
        lines.append(f"| `egopatch {name}` | {about}{f'; short for `egopatch {stage} {name}`' if stage else ''} |")
    for name in egopatch_main.COMMANDS:
        if name not in (*parsers_by_stage, *egopatch_main.SHORT):
            lines += ["", f"### egopatch {name}", "", f"```text\n{_help_of(name)}```"]
    for stage, parsers in parsers_by_stage.items():
        lines += ["", f"## egopatch {stage}"]
        for name, parser in parsers.items():
            lines += _command(f"{stage} {name}", parser)
    return "\n".join(lines) + "\n"


def _help_of(name: str) -> str:
    """The help of a command of `egopatch` itself."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        egopatch_main.main([name, "--help"])
    return out.getvalue()


def command_parsers() -> dict[str, dict[str, argparse.ArgumentParser]]:
    """Stage to command to the parser of its options."""
    return {
        name: {
            command: _filled(stage, command, make(prog=command, description=stage.COMMANDS[command]))
            for command in stage.COMMANDS
        }
        for name, (stage, make) in STAGES.items()
    }


def _filled(stage: ModuleType, name: str, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser of a command with all its options, which it has when it prints its help."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        stage.load_command(name).main(parser, ["--help"])
    return parser


def _command(title: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    if not parser.description:
        raise Undocumented(f"egopatch {title} has no description")
    yield from ("", f"### egopatch {title}", "", parser.description[:1].upper() + parser.description[1:] + ".")
    if parser.epilog:
        yield from ("", parser.epilog)
    shown = [
        action for action in parser._actions if action.help != argparse.SUPPRESS and not _is_common(action, parser)
    ]
    if shown:
        yield from ("", "| option | default | meaning |", "|---|---|---|")
    for action in shown:
        if not action.help:
            raise Undocumented(f"egopatch {title} does not describe {'/'.join(action.option_strings) or action.dest}")
        default = "required" if action.required else _default(action)
        yield f"| {_code(_usage(action))} | {default} | {_cell(action.help % {'default': action.default})} |"


def _is_common(action: argparse.Action, parser: argparse.ArgumentParser) -> bool:
    """Whether many commands have the option: one of help, or of an experiment's config."""
    takes_config = any(other.dest == "config" for other in parser._actions)
    sections = {section.name for section in dataclasses.fields(Config)} if takes_config else set()
    return bool({*action.option_strings} & COMMON) or action.dest.partition(".")[0] in sections


def _default(action: argparse.Action) -> str:
    if action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
        return ""
    if isinstance(action.default, Path) and action.default.is_relative_to(PACKAGE):
        return _code(str(action.default.relative_to(PACKAGE)))
    return _code(_yaml(action.default))


def _usage(action: argparse.Action) -> str:
    """The option and the name of its value; a choice is its values."""
    values = "|".join(map(str, action.choices)) if action.choices else str(action.metavar or action.dest)
    if action.metavar and (choice := re.fullmatch(r"{(.+)}", str(action.metavar))):
        values = choice[1].replace(",", "|")
    if values.lower() == action.dest:
        values = values.rpartition(".")[2].upper()
    if not action.option_strings:
        return values
    return action.option_strings[-1] + ("" if action.nargs == 0 else f" {values}")


def main(args: Sequence[str] | None = None) -> int:
    """Write the pages below the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Write the reference of options and commands.")
    parser.add_argument("folder", type=Path, help="folder to write the pages to")
    folder = parser.parse_args(args).folder
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
