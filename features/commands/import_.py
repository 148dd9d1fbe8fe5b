"""`features import`: create a store from features that another program wrote."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from egopatch.features.commands.convert import print_copy
from egopatch.features.commands.shared import CommandParser, count, location, progress, require_existing
from egopatch.features.formats.interface import CODECS
from egopatch.features.values.errors import BadLocation

_FILES = "a folder or an HDF5 file"


def main(parser: CommandParser, args: Sequence[str]) -> int:
    """Print the facts of the store, and how to train on it; returns 0."""
    parser.add_place("SOURCE", f"{_FILES} of features")
    parser.add_argument("--to", type=location, required=True, metavar="STORE", help="store to create")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], default="float16", help="dtype of the patches on disk"
    )
    parser.add_argument(
        "--grid",
        type=_grid,
        metavar="ROWSxCOLS",
        help="grid of the patches (default: a square, if N is a square number)",
    )
    parser.add_argument("--shard", type=count, default=64, metavar="N", help="number of clips in a shard")
    parser.add_argument("--format", choices=list(CODECS), default="zarr", help="file format of the store")
    options = parser.parse_args(args)
    if not isinstance(options.store, Path):
        raise BadLocation(f"SOURCE is {str(options.store)!r}; expected {_FILES} on this machine")
    require_existing("SOURCE", options.store, f"{_FILES} of features")
    from egopatch.features.tools.importing import import_features

    with progress("import", "clips, read twice", options) as on_clips:
        store = import_features(
            options.store, options.to, options.dtype, options.grid, options.shard, options.format, on_clips
        )
    hint = (
        "to train on this store, set encoder.arch to imported in a config, and encode the questions with "
        "`egopatch extract run --config CONFIG`"
    )
    print_copy(store, options, hint)
    return 0


def _grid(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a grid; expected rows and columns, such as 14x14")
    return int(rows), int(cols)
