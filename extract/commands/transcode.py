"""`extract transcode`: small copies of all clips, which decode several times as fast."""

import shlex
import sys
from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.features.common.command_line import local_path, messages_apart, print_result
from egopatch.features.common.units import counted, format_bytes


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Transcode; returns 1 if clips have no copy."""
    parser.usage = "--config FILE --out DIR [options]"
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="folder for copies and annotations"
    )
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.extract.transcoding.copies import transcode
    from egopatch.extract.transcoding.segment import SETTINGS

    with messages_apart(options.json):
        result = transcode(config, options.out)
    for clip_id, reason in result.failed.items():
        print(f"failed {clip_id}: {reason}", file=sys.stderr)
    size = sum(segment.size for segment in result.made)
    made = len(result.made)
    print_result(
        options.json,
        {"out": options.out, "made": made, "bytes": size, "kept": result.kept, "failed": result.failed},
        f"{options.out}: {counted(made, 'clip')} transcoded ({format_bytes(size)}; {SETTINGS}), {result.kept} already "
        f"there, {len(result.failed)} failed; use them with --data.root {shlex.quote(str(options.out))} and another "
        "--store.path",
    )
    return 1 if result.failed else 0
