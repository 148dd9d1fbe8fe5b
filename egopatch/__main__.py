"""`egopatch extract|features|train COMMAND ...`: one name for the three command lines."""

import sys
from collections.abc import Sequence
from importlib import import_module

from egopatch.features.common.command_line import find_command

COMMANDS = {
    "extract": "stage one: encode videos once and store their patch tokens",
    "features": "inspect, verify, repair and convert stores",
    "train": "stage two: train and evaluate heads, sweep, make tables and reports",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code: 0 done, 1 the work failed, 2 wrong usage or configuration."""
    args = list(sys.argv[1:] if args is None else args)
    name = find_command("egopatch", COMMANDS, "egopatch COMMAND ...; egopatch COMMAND --help lists its commands", args)
    if isinstance(name, int):
        return name
    return int(import_module(f"egopatch.{name}.__main__").main(args[1:]))


if __name__ == "__main__":
    sys.exit(main())
