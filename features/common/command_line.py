"""Programs with several commands: which one a command line names."""

import sys
from collections.abc import Mapping, Sequence


def find_command(program: str, commands: Mapping[str, str], usage: str, args: Sequence[str]) -> str | int:
    """The command that `args` begin with; without one, the exit code once help or an error has been printed.

    Args:
        program: Name of the program, for errors.
        commands: Command -> help in one line.
        usage: First line of the help.
        args: Command line, without the program.
    """
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, commands))
        print("\n".join([f"usage: {usage}", *(f"  {name:<{width}}  {text}" for name, text in commands.items())]))
        return 0 if args else 2
    if args[0] not in commands:
        print(f"{program}: error: unknown command {args[0]!r}; choose one of {', '.join(commands)}", file=sys.stderr)
        return 2
    return args[0]
