"""`egopatch completion bash|zsh`: a script that completes commands and options, built from the commands themselves."""

import contextlib
import dataclasses
import io
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from importlib import import_module

from egopatch.configs.command_line import ConfigParser, StageParser
from egopatch.configs.schema import Config
from egopatch.features.commands.shared import CommandParser

SHELLS = ("bash", "zsh")

SCRIPT = """\
_egopatch() {
    local word=${COMP_WORDS[COMP_CWORD]} words=
    case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
%s
    esac
    case "$word $words" in -*) ;; *" -"*) words= ;; esac  # files where no option begins
    if [ "$COMP_CWORD" -eq 1 ]; then words="%s"
    elif [ "$COMP_CWORD" -eq 2 ]; then
        case "${COMP_WORDS[1]}" in
%s
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _egopatch egopatch
"""


def main(args: Sequence[str]) -> int:
    """Print the script; returns 0, or 2 for another shell."""
    usage = f"egopatch completion {'|'.join(SHELLS)}; save its output in a file that your shell reads"
    if list(args) in (["-h"], ["--help"]):
        print(f"usage: {usage}")
        return 0
    if len(args) != 1 or args[0] not in SHELLS:
        print(f"egopatch completion: error: got {' '.join(args) or 'nothing'!r}; expected {usage}", file=sys.stderr)
        return 2
    if args[0] == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(script(), end="")
    return 0


def script() -> str:
    """The script for bash, which zsh runs after `bashcompinit`."""
    from egopatch.__main__ import COMMANDS, SHORT, STAGES

    options: dict[str, list[str]] = {}
    commands: dict[str, dict[str, list[str]]] = {}
    for stage in STAGES:
        commands[stage] = dict(_commands_of(stage))
        options |= {f"'{stage} {name}'": words for name, words in commands[stage].items()}
    options |= {f"'{name} '*": commands[stage][name] for name, stage in SHORT.items()}
    options |= {"'demo '*": ["--small", "--out", "--json"], "'completion '*": list(SHELLS)}
    cases = [f"        {pattern}) words='{' '.join(words)}' ;;" for pattern, words in options.items()]
    second = [f"            {stage}) words='{' '.join(names)}' ;;" for stage, names in commands.items()]
    return SCRIPT % ("\n".join(cases), " ".join(COMMANDS), "\n".join(second))


def _commands_of(stage: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a stage and its options."""
    module = import_module(f"egopatch.{stage}.__main__")
    sections = {f"--{section.name}" for section in dataclasses.fields(Config)}
    for name in module.COMMANDS:
        parser = CommandParser(prog=name) if stage == "features" else StageParser(prog=name)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            module.load_command(name).main(parser, ["--help"])
        shown = {option for option, action in parser._option_string_actions.items() if action.help != SUPPRESS}
        read_first = parser.read_first if isinstance(parser, ConfigParser) else ()
        yield name, [*read_first, *sorted(shown - sections)]
