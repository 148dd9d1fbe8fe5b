"""`features convert`: copy a store, with its text states, to another format, dtype, shard size or codec."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from egopatch.features.commands.info import facts
from egopatch.features.commands.shared import CommandParser, count, location, progress, require_store
from egopatch.features.common.command_line import print_result
from egopatch.features.common.units import counted, format_bytes
from egopatch.features.formats.interface import CODECS
from egopatch.features.values.spec import Codec, StoredDtype

if TYPE_CHECKING:
    from egopatch.features.store.store import Store


def main(parser: CommandParser, args: Sequence[str]) -> int:
    """Print the facts of the copy; returns 0."""
    parser.add_place()
    add_copy(parser)
    parser.add_argument("--format", choices=list(CODECS), help="file format of the copy")
    parser.add_argument("--dtype", choices=get_args(StoredDtype), help="dtype of the tokens on disk")
    parser.add_argument("--shard", type=count, metavar="N", help="number of clips in a shard")
    parser.add_argument("--codec", choices=get_args(Codec), help="lossless compression of each clip")
    options = parser.parse_args(args)
    if options.format is None and str(options.to) in CODECS and not Path(str(options.to)).exists():
        parser.error(
            f"--to is {str(options.to)!r}, a format; expected the folder of the copy: use --format {options.to} "
            "instead, or both options for a folder of that name"
        )
    require_store(options.store)
    from egopatch.features.tools.convert import convert

    changes = [
        str(value) for value in (options.format, options.dtype, options.shard, options.codec) if value is not None
    ]
    to = options.to or options.store.with_name("_".join([options.store.name, *(changes or ["copy"])]))
    with progress("convert", "clips", options) as on_clips:
        store = convert(
            options.store, to, options.format, options.dtype, options.shard, options.codec, on_clips=on_clips
        )
    print_copy(store, options)
    return 0


def add_copy(parser: CommandParser) -> None:
    """Add `--to`, the place of a copy."""
    parser.add_argument("--to", type=location, metavar="FOLDER", help="folder of the copy (default: beside STORE)")


def print_copy(store: "Store", options: argparse.Namespace, *more: str) -> None:
    """Print the clips, bytes and reconstruction errors of a store that was made from another, and `more` lines."""
    size = f"{counted(len(store.clip_ids), 'clip')}, {format_bytes(store.nbytes)}"
    lines = [f"{store.path}: {size}, from {options.store}"]
    lines += [
        f"{array}: reconstruction error {error:.2%} (relative root mean square, worst clip)"
        for array, error in store.reconstruction_error.items()
    ]
    print_result(options.json, facts(store.catalog), "\n".join([*lines, *more]))
