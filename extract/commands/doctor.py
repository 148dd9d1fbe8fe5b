"""`extract doctor`: faults in the annotations and videos, and advice for this machine."""

import dataclasses
import json
from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, add_config_arguments, parse_config
from egopatch.extract.planning.doctor import examine, format_diagnosis


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Print the diagnosis; returns 1 if there are faults."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config_arguments(parser)
    config, options = parse_config(parser, args)
    diagnosis = examine(config)
    print(json.dumps(dataclasses.asdict(diagnosis), indent=1) if options.json else format_diagnosis(diagnosis))
    return 0 if diagnosis.sound else 1
