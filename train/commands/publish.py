"""`train publish`: write a folder with everything that an upload of a head and its store needs."""

from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.features.common.command_line import local_path, messages_apart, print_result
from egopatch.features.common.units import format_bytes


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write the folder and print what to look at before uploading it; nothing is sent anywhere."""
    parser.usage = "--config FILE --to FOLDER [options]"
    parser.add_argument(
        "--to", type=local_path, required=True, metavar="FOLDER", help="folder to write head/ and store/ to"
    )
    parser.add_argument("--head-only", action="store_true", help="leave out the store, which may be large")
    parser.add_argument(
        "--terms", type=str, action="append", default=[], metavar="'NAME: LICENCE'",
        help="licence of weights or data whose licence is not known here; repeat the option for each",
    )  # fmt: skip
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.train.publishing.folders import publish

    with messages_apart(options.json):
        done = publish(config, options.to, options.terms, options.head_only)
    sizes = {
        str(folder): sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) for folder in done.folders
    }
    lines = [f"{folder}: {format_bytes(size)}, with README.md as its card" for folder, size in sizes.items()]
    lines += [f"note: {note}" for note in done.notes]
    print_result(options.json, {"folders": sizes, "notes": done.notes}, "\n".join(lines))
    return 0
