"""`train evaluate`: evaluate a trained head, or a published checkpoint, on test."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.configs.schema import Config
from egopatch.features.common.command_line import messages_apart, print_result
from egopatch.train.rundir.names import CARD
from egopatch.train.rundir.run_folder import RunError


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Evaluate and print the accuracies on test.

    Raises:
        RunError: The run's folder was moved; or as `train.fitting.fit.evaluate`.
    """
    parser.add_argument(
        "--from", type=Path, metavar="RUN", help="folder of the run whose head to evaluate on this config's data set"
    )
    config, options = parse_config(parser, args)
    if options["from"] is None:
        _require_run_in_place(config, [Path(str(file)) for file in options.config or ()])
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


def _require_run_in_place(config: Config, files: Sequence[Path]) -> None:
    """Refuse the `config.yaml` of a run whose folder was moved: it still names the old one.

    Raises:
        RunError: A head was trained in the folder of one of `files`, and none in `run.dir`.
    """
    for file in files:
        if (file.parent / CARD).exists() and not (config.run.dir / CARD).exists():
            raise RunError(
                f"run.dir is {config.run.dir}, where no head was trained, but one was in the folder of {file}, which "
                f"was perhaps moved; add --run.dir {shlex.quote(str(file.parent))}"
            )
