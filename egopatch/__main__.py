"""`egopatch COMMAND ...`: one entry point for all; `extract`, `features` and `train` have commands of their own."""

import sys
from collections.abc import Sequence
from importlib import import_module

from egopatch import __version__
from egopatch.interrupt import interrupts_in_one_line

STAGES = ("extract", "features", "train")
COMMANDS = {
    "ask": "ask a question about a video file, or a clip of a store",
    "demo": "run everything on rendered videos: --small takes under a minute",
    "doctor": "check this machine and, with --config, a data set",
    "extract": "stage one: encode videos once and store their patch tokens",
    "features": "inspect, verify, repair and convert stores",
    "train": "stage two: train and evaluate heads, sweep, make tables and reports",
    "publish": "write a folder with a head and its store, ready to upload",
    "completion": "print a script that lets bash or zsh complete commands and options",
}
# Commands of a stage that also have a short name.
SHORT = {"ask": "train", "doctor": "extract", "publish": "train"}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code: 0 done, 1 the work failed, 2 wrong usage or configuration,
    130 interrupted by Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args)
    # Imported here, because it takes half a second, during which an interrupt must print one line too.
    from egopatch.features.common.command_line import find_command, run_command

    if args == ["--version"]:
        return run_command("egopatch", lambda: print(f"egopatch {__version__}"))
    usage = "egopatch COMMAND ... | --version; egopatch COMMAND --help shows its commands or options"
    name = find_command("egopatch", COMMANDS, usage, args, _commands_of_stages)
    if isinstance(name, int):
        return name
    if name in SHORT:
        return int(import_module(f"egopatch.{SHORT[name]}.__main__").main(args, "egopatch"))
    module = f"egopatch.{name}.__main__" if name in STAGES else f"egopatch.{name}"
    return run_command(f"egopatch {name}", lambda: import_module(module).main(args[1:]))


def _commands_of_stages() -> dict[str, str]:
    """Command of a stage -> how `egopatch` runs it, such as `train fit`."""
    modules = {stage: import_module(f"egopatch.{stage}.__main__") for stage in STAGES}
    return {name: f"{stage} {name}" for stage, module in modules.items() for name in module.COMMANDS}


def program() -> None:
    """Run the command line of this process, and end it."""
    with interrupts_in_one_line("egopatch"):
        sys.exit(main())


if __name__ == "__main__":
    program()
