"""`train sweep`: train many settings of a head on one reading of the features."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.configs.schema import ConfigError
from egopatch.features.common.command_line import messages_apart, print_result

STACKED = (
    "runs that differ only in ratio train together and round in a different order from `train fit`, so their "
    "accuracies may differ by several points from what `train fit` reaches with the same settings; before you choose "
    "between settings, train them with `train fit`"
)


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Train every run and print where the results are; returns 130 after Ctrl-C, and 75 after a scheduler's signal."""
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=None, help="values of head.ratio (default: the config's)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=None, help="values of train.seed (default: the config's)"
    )
    parser.add_argument(
        "--grid", type=Path | None, default=None, help="YAML file with lines such as head.dropout: [0.0, 0.1]"
    )
    parser.add_argument(
        "--name", type=str | None, default=None, help="name of the sweep's folder (default: split and name of run.dir)"
    )
    config, options = parse_config(parser, args)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "torchrun cannot start a sweep; start the command once per machine or GPU instead, as in "
            "CUDA_VISIBLE_DEVICES=1 egopatch train sweep ...: each process trains the runs that no other one holds"
        )
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.train.heads import can_stack
    from egopatch.train.processes.stopping import Stopped
    from egopatch.train.sweeps.sweep import run_sweep

    command = shlex.join(["egopatch", "train", "sweep", *args])
    try:
        with messages_apart(options.json):
            path = run_sweep(config, options.ratios, options.seeds, options.grid, options.name, command)
    except Stopped as stopped:
        print(f"train sweep: {stopped}", file=sys.stderr)
        return stopped.code
    result = json.loads(path.read_text(encoding="utf-8"))
    several = len({member["ratio"] for member in result["members"]}) > 1
    note = STACKED if several and can_stack(config.head.name) else None
    print_result(options.json, {"file": path, "note": note, **result}, f"{path}\nnote: {note}" if note else str(path))
    return 0
