"""The part of a command line that describes its experiment, for the commands that messages suggest."""

import itertools
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from egopatch.configs.command_line import OPTION_OF_HEAD, option_names

# Stands for the experiment in messages of code that does not see the command line; see `name_experiment`.
UNNAMED = "--config CONFIG"


def overrides_in(args: Sequence[str]) -> list[str]:
    """The options of an experiment in a command line, such as `--head.ratio 0.5`, with their values."""
    found: list[str] = []
    for place, arg in enumerate(args):
        name, equals, _ = arg.partition("=")
        if name.startswith(OPTION_OF_HEAD) or (name.startswith("--") and name[2:] in option_names()):
            found += [arg] if equals else args[place : place + 2]
    return found


def experiment_in(args: Sequence[str], *others: Sequence[str]) -> list[str]:
    """The part of a command line that describes its experiment: `--config` and the options that override it.

    Each of `others` is a line with another `--config`; all are joined, as in `extract run --config A B`.
    """
    configs: list[str] = []
    for before, arg in itertools.pairwise(["", *args]):
        if before == "--config" or arg.startswith("--config="):
            configs += ["--config", arg.removeprefix("--config=")]
    files = [experiment_in(line)[1] for line in others]
    return [*configs[:2], *files, *configs[2:], *overrides_in(args)]


def name_experiment(text: str, *lines: Sequence[str]) -> str:
    """`text` with the experiment of a command line in place of `UNNAMED`, so that its commands can be run.

    A command line without `--config` leaves the text as it is: its options may belong to the experiment of a run.
    Several lines are joined as in `experiment_in`.
    """
    experiment = experiment_in(*lines)
    return text.replace(UNNAMED, shlex.join(experiment)) if "--config" in experiment else text


@contextmanager
def experiment_named(*lines: Sequence[str]) -> Iterator[None]:
    """Inside the block, errors name the experiment of a command line as `name_experiment` does."""
    try:
        yield
    except Exception as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (name_experiment(error.args[0], *lines), *error.args[1:])
        raise
