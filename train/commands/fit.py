"""`train fit`: train a head and evaluate its best epoch on test."""

import shlex
import sys
from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.features.common.command_line import messages_apart, print_result
from egopatch.features.common.signals import Requeue


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Train the head and print its accuracies on test; returns 130 after Ctrl-C, and 75 after a scheduler's signal."""
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.train.fitting.experiment import pick_device
    from egopatch.train.fitting.fit import fit, test_line
    from egopatch.train.processes.distributed import RankLost, join
    from egopatch.train.processes.stopping import Stopped
    from egopatch.train.rundir.results import table_folder

    with join(cuda=pick_device(config.train.device).type == "cuda") as ranks:
        try:
            with messages_apart(options.json):
                metrics = fit(config, shlex.join(["egopatch", "train", "fit", *args]), ranks)
                if not config.run.dir.resolve().is_relative_to(table_folder(config).resolve()):
                    ranks.print_once(
                        f"note: run.dir {config.run.dir} is not below run.table, {config.run.table}, so table and "
                        "report leave it out, and ask needs --run; to include the run, set run.table to a folder that "
                        "contains run.dir"
                    )
        except Stopped as stopped:
            if ranks.first:
                print(f"train fit: {stopped}", file=sys.stderr)
            return stopped.code
        except Requeue as notice:
            # torchrun sends SIGTERM to the other ranks once one has ended; that loss is the cause to report.
            if isinstance(notice.__context__, RankLost):
                raise notice.__context__ from None
            raise
        if ranks.first:
            record = {"run": config.run.dir, **metrics.as_json(), "quarantined": metrics.quarantined}
            print_result(options.json, record, test_line(config, metrics))
    return 0
