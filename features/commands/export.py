"""`features export`: write a store as files for other programs."""

from collections.abc import Sequence
from pathlib import Path

from egopatch.features.commands.shared import CommandParser, progress, require_store
from egopatch.features.common.command_line import local_path, print_result
from egopatch.features.common.units import counted

KINDS = ("npy", "pt", "hdf5", "webdataset", "lmdb")  # as in `tools.export.WRITERS`


def main(parser: CommandParser, args: Sequence[str]) -> int:
    """Name the folder and count the clips; returns 0."""
    parser.add_place()
    parser.add_argument("--to", choices=KINDS, required=True, help="kind of files to write")
    parser.add_argument("--out", type=local_path, metavar="FOLDER", help="folder to create (default: beside STORE)")
    parser.add_argument("--pooled", action="store_true", help="write the mean of each frame's patches in their place")
    parser.add_argument("--by", choices=["clip", "video"], default="clip", help="one file or key per clip or per video")
    options = parser.parse_args(args)
    require_store(options.store)
    from egopatch.features.tools.export import export

    out = options.out or Path(f"{Path(str(options.store)).name}_{options.to}")
    if options.out is None and isinstance(options.store, Path):
        out = options.store.with_name(out.name)
    with progress("export", "clips", options) as on_clips:
        clips = export(options.store, out, options.to, options.pooled, options.by == "video", on_clips)
    written = f"{out}: {counted(clips, 'clip')} as {options.to}, from {options.store}"
    print_result(options.json, {"out": str(out), "clips": clips}, written)
    return 0
