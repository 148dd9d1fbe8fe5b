"""Stage two from the command line: `egopatch train COMMAND --config configs/x.yaml`."""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType

from egopatch.interrupt import JOBS, interrupts_in_one_line

with interrupts_in_one_line("train"):
    from egopatch.configs.command_line import StageParser
    from egopatch.configs.experiment_line import experiment_named
    from egopatch.configs.schema import ConfigError
    from egopatch.extract.datasets import DatasetError
    from egopatch.extract.errors import CheckpointError, JobFailed
    from egopatch.features.common.command_line import find_command, run_command
    from egopatch.features.common.machine import request_huge_pages
    from egopatch.features.common.signals import requeue_on_signals
    from egopatch.features.values.errors import BadLocation, FingerprintMismatch, StoreError

# Each command is the module of the same name in `train.commands`.
COMMANDS = {
    "fit": "train a head, keep the epoch best on val, and evaluate it on test",
    "evaluate": "evaluate the checkpoint in run.dir, or a fine-tuned --head.checkpoint, on test",
    "ask": "answer a question about a stored clip, with the patches that the head kept",
    "explain": "measure which patches matter to a trained head's answers: deletion and insertion curves",
    "score": "compute metrics of any system's answers",
    "sweep": "train many settings of a head while reading the features only once",
    "table": "write the results table of all runs below run.table",
    "report": "write the self-contained HTML report beside the table",
    "publish": "write a folder with a head and its store, ready to upload",
    "bench": "run a benchmark script: bench NAME [its options]",
}


def main(args: Sequence[str] | None = None, program: str = "train") -> int:
    """Run one command; returns its exit code. Errors and help call the program `program`.

    0: done. 1: the work failed. 2: wrong usage or configuration. 75: a scheduler's signal ended the training; run the
    command again to resume. 130: interrupted by Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args)
    name = find_command("train", COMMANDS, "egopatch train COMMAND [options]; COMMAND --help lists its options", args)
    if isinstance(name, int):
        return name
    # Where HOME cannot be written, matplotlib makes a temporary folder and logs two warnings when it is imported.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    request_huge_pages()
    parser = StageParser(prog=f"{program} {name}", description=COMMANDS[name])

    def command() -> int:
        # Imported when it is called, to save start-up time: most commands need torch, which takes seconds to import.
        with requeue_on_signals(parser.prog) if name in JOBS["train"] else nullcontext(), experiment_named(args[1:]):
            return int(load_command(name).main(parser, args[1:]))

    return run_command(
        f"{parser.prog} (rank {os.environ['RANK']})" if "RANK" in os.environ else parser.prog,
        command,
        wrong_usage=(DatasetError, CheckpointError, ConfigError, BadLocation, FingerprintMismatch),
        failures=(StoreError, ValueError, OSError, JobFailed),
    )


def load_command(name: str) -> ModuleType:
    """The module of a command, whose `main(parser, args)` runs it."""
    return import_module(f"egopatch.train.commands.{name}")


if __name__ == "__main__":
    with interrupts_in_one_line("train"):
        sys.exit(main())
