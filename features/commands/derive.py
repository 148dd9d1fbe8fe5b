"""`features derive`: copy a store with only the highest-ranked patches of each frame."""

import argparse
from collections.abc import Sequence
from contextlib import suppress

from egopatch.features.commands.convert import add_copy, print_copy
from egopatch.features.commands.shared import CommandParser, progress, require_store


def main(parser: CommandParser, args: Sequence[str]) -> int:
    """Print the facts of the copy; returns 0."""
    parser.add_place()
    add_copy(parser)
    parser.add_argument(
        "--keep", type=_share, required=True, metavar="SHARE", help="share of each frame's patches to keep"
    )
    parser.add_argument("--by", choices=["saliency"], default="saliency", help="score that ranks the patches")
    options = parser.parse_args(args)
    require_store(options.store)
    from egopatch.features.tools.derive import derive

    to = options.to or options.store.with_name(f"{options.store.name}_keep{options.keep:g}")
    with progress("derive", "clips", options) as on_clips:
        store = derive(options.store, to, options.keep, on_clips)
    print_copy(store, options)
    return 0


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is out of range; expected a number above 0 and at most 1")
