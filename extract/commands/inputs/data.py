"""`extract data`: download the archives, checkpoints and tokenizers that a config needs."""

from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.extract.fetch.sources import DEFAULT_SOURCES, load_sources
from egopatch.features.common.command_line import messages_apart, print_result


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Check and download the files; returns 1 if one is missing or wrong."""
    parser.add_argument("--offline", action="store_true", help="use no network; print which file to put where")
    parser.add_argument(
        "--sources",
        type=Path,
        default=DEFAULT_SOURCES,
        help="YAML file of links, with its lock file beside it; the default file's lock is in the current directory",
    )
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.extract.fetch.lockfile import Lockfile
    from egopatch.extract.fetch.provide import files_as_json, format_files, provide
    from egopatch.extract.fetch.required import required_files

    sources = load_sources(options.sources)
    lockfile = Lockfile(sources.lock_path)
    with messages_apart(options.json):
        files = provide(required_files(config, sources), lockfile, offline=options.offline)
    print_result(options.json, files_as_json(files, lockfile), format_files(files))
    return 0 if all(file.good for file in files) else 1
