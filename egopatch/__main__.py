"""`egopatch extract|features|train COMMAND ...`: one name for the three command lines."""

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "extract": "stage one: encode videos once and store their patch tokens",
    "features": "inspect, verify, repair and convert stores",
    "train": "stage two: train and evaluate heads, sweep, make tables and reports",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code: 0 done, 1 the work failed, 2 wrong usage or configuration."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        print(f"egopatch: error: unknown command {name!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return int(import_module(f"egopatch.{name}.__main__").main(rest))


def _usage() -> str:
    lines = [f"  {name:<9} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: egopatch COMMAND ...; egopatch COMMAND --help lists its commands", *lines])


if __name__ == "__main__":
    sys.exit(main())
