"""`extract retry`: `extract run`, including the quarantined clips."""

from collections.abc import Sequence

from egopatch.configs.schema import ConfigParser
from egopatch.extract.commands import run


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Encode as `extract run`, and try the quarantined clips again."""
    return run.main(parser, args, retry=True)
