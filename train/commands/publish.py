"""`train publish`: a folder with all that an upload of a head and its store would hold."""

from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser, add_config_arguments, parse_config


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write the folder and print what to look at before uploading it; nothing is sent anywhere."""
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to write head/ and store/ to")
    parser.add_argument("--head-only", action="store_true", help="leave out the store, which may be large")
    parser.add_argument(
        "--terms", type=str | None, default=None, help="licence of weights and data of which none is known here"
    )
    add_config_arguments(parser)
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.train.publishing.folders import publish

    done = publish(config, options.to, options.terms, options.head_only)
    for folder in done.folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / 1e6:.1f} MB, with README.md as its card")
    for note in done.notes:
        print(f"note: {note}")
    return 0
