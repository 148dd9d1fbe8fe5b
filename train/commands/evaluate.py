"""`train evaluate`: evaluate a trained head, or a published checkpoint, on test."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.features.common.command_line import messages_apart, print_result


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Evaluate and print the accuracies on test."""
    parser.add_argument(
        "--from", type=Path, metavar="RUN", help="folder of the run whose head to evaluate on this config's data set"
    )
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.train.fitting.experiment import pick_device
    from egopatch.train.fitting.fit import evaluate, test_line
    from egopatch.train.processes.distributed import join

    with join(cuda=pick_device(config.train.device).type == "cuda") as ranks:
        with messages_apart(options.json):
            metrics = evaluate(config, shlex.join(["egopatch", "train", "evaluate", *args]), ranks, options["from"])
        if ranks.first:
            record = {"run": config.run.dir, **metrics.as_json(), "quarantined": metrics.quarantined}
            print_result(options.json, record, test_line(config, metrics))
    return 0
