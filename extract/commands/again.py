"""The command line that retries the clips in quarantine, for the end of a command's output."""

import shlex
from collections.abc import Sequence

from egopatch.configs.experiment_line import experiment_in


def retry_command(args: Sequence[str]) -> str:
    """`egopatch extract retry` for the experiment of a command line: its `--config` and its options in place of it."""
    return shlex.join(["egopatch", "extract", "retry", *experiment_in(args)])


def after_quarantine(args: Sequence[str]) -> str:
    """What to do about clips in quarantine, in one line; `args` as for `retry_command`."""
    return (
        "clips stay in quarantine until they are retried: fix what the reason names, such as a damaged video, then "
        f"run `{retry_command(args)}`"
    )
