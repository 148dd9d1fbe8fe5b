"""Stores from the command line: `egopatch features COMMAND STORE [--json]`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from egopatch.interrupt import interrupts_in_one_line

with interrupts_in_one_line("features"):
    from egopatch.features.commands.shared import CommandParser
    from egopatch.features.common.command_line import find_command, run_command
    from egopatch.features.values.errors import BadLocation, FingerprintMismatch, StoreError, WrongOption

# Each command is the module of the same name in `features.commands`; that of `import`, a word of Python, is `import_`.
COMMANDS = {
    "info": "show how a store was made and how many clips it holds",
    "verify": "read back every committed clip; name the bad ones and exit with 1 if there are any",
    "repair": "remove damaged clips, so that `egopatch extract run` encodes exactly those again",
    "convert": "copy a store, with its text states, to another format, dtype, shard size or codec",
    "unlock": "remove leases left by machines that are gone for good; refuses if a running process holds one",
    "compare": "say whether two stores, or feature files, agree; if not, name the likely cause and exit with 1",
    "export": "write a store as files for other programs",
    "import": "create a store from features that another program wrote",
    "derive": "copy a store with only the highest-ranked patches of each frame",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: the work failed or found faults. 2: wrong usage. 130: interrupted by Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args)
    name = find_command(
        "features", COMMANDS, "egopatch features COMMAND STORE [options]; COMMAND --help lists its options", args
    )
    if isinstance(name, int):
        return name
    parser = CommandParser(prog=f"egopatch features {name}", description=COMMANDS[name])
    return run_command(
        f"features {name}",
        lambda: load_command(name).main(parser, args[1:]),
        wrong_usage=(BadLocation, FingerprintMismatch, WrongOption),
        failures=(StoreError, OSError),
    )


def load_command(name: str) -> ModuleType:
    """The module of a command, whose `main(parser, args)` runs it."""
    return import_module(f"egopatch.features.commands.{'import_' if name == 'import' else name}")


if __name__ == "__main__":
    with interrupts_in_one_line("features"):
        sys.exit(main())
