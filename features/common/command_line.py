"""Helpers for programs with several commands: find the command, run it, print its result and explain its failure."""

import argparse
import difflib
import json
import math
import os
import re
import select
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from egopatch.features.common.os_errors import with_remedy
from egopatch.features.common.signals import REQUEUE, Requeue
from egopatch.interrupt import INTERRUPTED as INTERRUPTED
from egopatch.interrupt import exit_code_of_interrupt, report_interrupt

_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


def find_command(
    program: str,
    commands: Mapping[str, str],
    usage: str,
    args: Sequence[str],
    meant_by: Callable[[], Mapping[str, str]] = dict,
) -> str | int:
    """The command that `args` begin with; without one, the exit code once help or an error has been printed.

    Args:
        program: Name of the program, for errors.
        commands: Command -> help in one line.
        usage: First line of the help.
        args: Command line, without the program.
        meant_by: Returns names that are not commands -> the command that is probably meant, for errors.
    """
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, commands))
        lines = [f"usage: {usage}", *(f"  {name:<{width}}  {text}" for name, text in commands.items())]
        return run_command(program, lambda: print("\n".join(lines))) or (0 if args else 2)
    if args[0] not in commands:
        known = {**meant_by(), **{name: name for name in commands}}
        close = difflib.get_close_matches(args[0], known, n=1)
        meant = f"; did you mean {known[close[0]]}?" if close else ""
        listed = ", ".join(commands)
        fault = f"unknown command {args[0]!r}; choose one of {listed}"
        if args[0].startswith("-"):
            fault = f"option {args[0]} comes before the command; put one of {listed} first, and its options after it"
        print(f"{program}: error: {fault}{meant}", file=sys.stderr)
        return 2
    return args[0]


def run_command(
    program: str,
    command: Callable[[], int | None],
    wrong_usage: tuple[type[Exception], ...] = (),
    failures: tuple[type[Exception], ...] = (OSError,),
) -> int:
    """Run `command`; returns its exit code, or 1, 2, 75 or 130 once an error or an interrupt is printed in one line.

    Args:
        program: Name of the program and of its command, for errors.
        command: Function that returns the exit code; None means 0.
        wrong_usage: Errors that mean exit code 2.
        failures: Errors that mean exit code 1.
    """
    _open_closed_streams()
    try:
        try:
            code = int(command() or 0)
        except SystemExit:  # such as after help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return code
    except wrong_usage as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except failures as error:
        if (failure := describe_failure(error)) is None:
            return 0
        print(f"{program}: failed: {failure}", file=sys.stderr)
        return 1
    except Requeue as notice:
        report_interrupt(program, notice)
        return REQUEUE
    except KeyboardInterrupt:
        report_interrupt(program)
        return exit_code_of_interrupt()


def _open_closed_streams() -> None:
    """Connect standard streams that the caller has closed, as by `>&-`, to the null device.

    Otherwise a file opened later, such as a store's, gets the number of the stream, and what libraries or child
    processes print goes into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is that of the closed stream
            os.set_inheritable(null, True)
            setattr(sys, name, os.fdopen(null, mode))


def local_path(text: str | Path) -> Path:
    """The path of a file or folder to write; a URL, which would become a folder here, is refused.

    jsonargparse checks what this returns by calling it again.
    """
    if "://" in str(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a URL; expected a path on this machine")
    return Path(text)


def messages_apart(as_json: bool) -> AbstractContextManager[object]:
    """With `--json`, send what the block prints to standard error, so that standard output holds the result alone."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def print_result(as_json: bool, record: Mapping[str, Any], text: str | None = None) -> None:
    """Print the result of a command: one JSON object with `--json`, else `text`; nothing if it is None.

    JSON has neither NaN nor infinity, which become null.
    """
    if as_json:
        print(json.dumps(_finite(record), indent=1, default=str))
    elif text is not None:
        print(text)


def _finite(value: Any) -> Any:
    """`value` with None in place of each number in it that is NaN or infinite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def pick_varied(faults: Sequence[str], most: int) -> list[str]:
    """At most `most` of the faults, in their order, for a message: the first of each kind, then the second of each, and
    so on, so that a thousand of one kind do not hide the others. Faults of a kind differ in numbers and quoted words.
    """
    seen: Counter[str] = Counter()
    turns = []
    for fault in faults:
        kind = _PARTICULARS.sub("", fault)
        turns.append(seen[kind])
        seen[kind] += 1
    chosen = sorted(range(len(faults)), key=turns.__getitem__)[:most]
    return [faults[place] for place in sorted(chosen)]


def describe_failure(error: BaseException) -> str | None:
    """Why a command failed, in one line; None if only the reader of its standard output, such as `head`, has exited.

    Buffered standard output is written first. If that fails, it is dropped with all that follows, since Python would
    try again at exit and print the error itself, in several lines.
    """
    try:
        sys.stdout.flush()
    except OSError as lost:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        lost.filename = "standard output"
        error = lost
    # A broken pipe may also be another one, to a child process.
    if isinstance(error, BrokenPipeError) and (error.filename or _reader_has_exited()):
        return None
    return " ".join(with_remedy(error).split())


def _reader_has_exited() -> bool:
    poll = select.poll()
    try:
        poll.register(sys.stdout, select.POLLERR)
    except (OSError, ValueError):  # standard output of a notebook is not a file
        return False
    return bool(poll.poll(0))
