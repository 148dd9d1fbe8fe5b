"""Stage one from the command line: `egopatch extract COMMAND --config configs/x.yaml`."""

import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType

from egopatch.interrupt import JOBS, interrupts_in_one_line

with interrupts_in_one_line("extract"):
    from egopatch.configs.command_line import StageParser
    from egopatch.configs.schema import ConfigError
    from egopatch.extract.datasets import DatasetError
    from egopatch.extract.errors import CheckpointError, JobFailed
    from egopatch.features.common.command_line import find_command, run_command
    from egopatch.features.common.machine import request_huge_pages
    from egopatch.features.common.signals import requeue_on_signals
    from egopatch.features.values.errors import BadLocation, FingerprintMismatch, StoreError

# Each command is the module of the same name in `extract.commands`, or in its room `inputs`; `retry` is `run` as well.
COMMANDS = {
    "videos": "encode a folder of your own videos, without annotations",
    "plan": "show what a run would do: clips, bytes, duration, and why it would be refused",
    "run": "encode every clip and question that is missing from the store",
    "status": "show how many clips are stored, quarantined and missing",
    "retry": "run, and try the quarantined clips again",
    "transcode": "write small copies of all clips with a key frame each second, which decode several times as fast",
    "doctor": "check this machine and, with --config, the annotations and videos; exits with 1 if there are faults",
    "data": "download the archives, checkpoints and tokenizers that the config needs",
    "standin": "write a tiny random-weight checkpoint and tokenizer to the config's paths",
    "frames": "write the exact frames of a clip that the encoder sees, to look at them",
    "synth": "render EgoSynth, a synthetic data set in EgoTaskQA's layout",
    "checkpoint": "inspect or convert a checkpoint file",
}
INPUTS = ("checkpoint", "data", "frames", "standin", "synth")


def main(args: Sequence[str] | None = None, program: str = "extract") -> int:
    """Run one command and return its exit code; `program` is the name that errors and help show.

    0: done. 1: the work failed. 2: wrong usage or configuration. 3: other processes still hold shards of the job. 75: a
    scheduler's signal ended the job, which must be started again. 130: interrupted by Ctrl-C.
    """
    args = list(sys.argv[1:] if args is None else args)
    name = find_command(
        "extract", COMMANDS, "egopatch extract COMMAND [options]; COMMAND --help lists its options", args
    )
    if isinstance(name, int):
        return name
    # Without semaphores, joblib warns when it is imported; the code that needs them reports that in one line itself.
    warnings.filterwarnings("ignore", message=".*joblib will operate in serial mode")
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    request_huge_pages()
    parser = StageParser(prog=f"{program} {name}", description=COMMANDS[name])
    retry = {"retry": True} if name == "retry" else {}

    def command() -> int:
        # Imported when it is called, to save start-up time: most commands need torch, which takes seconds to import.
        with requeue_on_signals(parser.prog) if name in JOBS["extract"] else nullcontext():
            return int(load_command(name).main(parser, args[1:], **retry))

    return run_command(
        parser.prog,
        command,
        wrong_usage=(DatasetError, CheckpointError, ConfigError, BadLocation, FingerprintMismatch),
        failures=(StoreError, OSError, JobFailed),
    )


def load_command(name: str) -> ModuleType:
    """The module of a command, whose `main(parser, args)` runs it."""
    module = "run" if name == "retry" else f"inputs.{name}" if name in INPUTS else name
    return import_module(f"egopatch.extract.commands.{module}")


if __name__ == "__main__":
    with interrupts_in_one_line("extract"):
        sys.exit(main())
