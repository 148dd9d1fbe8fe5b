"""`extract status`: how many clips the store holds. Torch is not imported, which takes longer than the answer."""

import dataclasses
import json
from collections.abc import Sequence

from egopatch.configs.schema import ConfigParser, add_config_arguments, parse_config
from egopatch.features.state.counts import count_clips


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Print the counts; returns 0."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config_arguments(parser)
    config, options = parse_config(parser, args)
    counts = count_clips(config.store.path)
    if options.json:
        print(json.dumps(dataclasses.asdict(counts), indent=1))
    else:
        print(
            f"{config.store.path}: {counts.committed}/{counts.planned} clips committed,"
            f" {counts.quarantined} quarantined, {counts.missing} missing, {counts.bytes / 1e6:.1f} MB"
        )
    return 0
