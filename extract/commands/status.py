"""`extract status`: how many clips the store holds, and how many are stale. Torch is not imported, to save time."""

import dataclasses
import json
from collections.abc import Sequence

from egopatch.configs.schema import Config, ConfigParser, add_config_arguments, parse_config
from egopatch.extract.datasets import DatasetError, load_dataset
from egopatch.extract.datasets.origins import OriginCheck, compare_origins
from egopatch.features.common.units import format_bytes
from egopatch.features.state.counts import count_clips, machines_line, read_ledger
from egopatch.features.state.ledger import Ledger


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Print the counts; returns 0."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config_arguments(parser)
    config, options = parse_config(parser, args)
    ledger = read_ledger(config.store.path)
    counts, check, machines = count_clips(config.store.path, ledger), _check(config, ledger), ledger.machines()
    if options.json:
        checked = {"stale": None, "unrecorded": None} if check is None else dataclasses.asdict(check)
        print(json.dumps(dataclasses.asdict(counts) | checked | {"machines": machines}, indent=1))
        return 0
    print(
        f"{config.store.path}: {counts.committed}/{counts.planned} clips committed,"
        f" {counts.quarantined} quarantined, {counts.missing} missing, {format_bytes(counts.bytes)}"
    )
    lines = ["the annotations cannot be read, so stale clips were not looked for"] if check is None else check.lines()
    for line in [*lines, *filter(None, [machines_line(machines)])]:
        print(line)
    return 0


def _check(config: Config, ledger: Ledger) -> OriginCheck | None:
    """The store compared with the annotations; None where they cannot be read, as on a machine without the data."""
    try:
        clips = load_dataset(config.data).clips
    except DatasetError:
        return None
    return compare_origins(clips, config.data.root, ledger.origins())
