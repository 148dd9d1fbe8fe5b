"""What several commands share: the parser, types of options, the check of a store's place, and the progress bar."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from egopatch.features.values.errors import BadLocation
from egopatch.features.values.location import Location, parse_location


class CommandParser(argparse.ArgumentParser):
    """The parser of a command; its errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with 2."""
        program = self.prog.removeprefix("egopatch ")
        print(f"{program}: error: {message}; `{self.prog} --help` describes it", file=sys.stderr)
        raise SystemExit(2)

    def add_place(self, metavar: str = "STORE", help: str = "folder or URL of the store") -> None:
        """Add the place that the command reads, as `store`, and `--json`."""
        self.add_argument("store", type=location, metavar=metavar, help=help)
        self.add_argument("--json", action="store_true", help="print the result as JSON")


def require_store(place: Location) -> None:
    """Refuse a path that is not a folder.

    Raises:
        BadLocation: The message names STORE, its value and what was expected.
    """
    if isinstance(place, Path) and not place.is_dir():
        fault = "is not a folder" if place.exists() else "does not exist"
        raise BadLocation(f"STORE is {str(place)!r}, which {fault}; expected the folder of a store")


def require_existing(name: str, place: Path, expected: str) -> None:
    """Refuse a path where there is nothing; `name` is the argument's.

    Raises:
        BadLocation: The message names the argument, its value and what was expected.
    """
    if not place.exists():
        raise BadLocation(f"{name} is {str(place)!r}, which does not exist; expected {expected}")


def location(text: str) -> Location:
    """The type of an option that names a folder or a URL."""
    if not text:  # as a path it would be the current folder
        raise argparse.ArgumentTypeError("it is empty; expected a folder or a URL")
    try:
        return parse_location(text)
    except BadLocation as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """The type of an option that is a number of clips."""
    with suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text} is out of range; expected at least 1 clip")


@contextmanager
def progress(label: str, unit: str, options: argparse.Namespace) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, on a terminal only; yields the function that updates it with units done and in all."""
    from egopatch.features.common.progress import ProgressDisplay

    silent = options.json or not sys.stderr.isatty()
    with ProgressDisplay(label, None, unit, out=sys.stderr, summary=False, silent=silent) as display:
        yield display.update
