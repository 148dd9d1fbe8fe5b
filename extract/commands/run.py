"""`extract run`: encode every clip and question that is missing from the store."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.configs.experiment_line import experiment_named, name_experiment
from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.commands.again import after_quarantine
from egopatch.extract.datasets.origins import others_line
from egopatch.extract.engines.job_slice import ALL_SHARDS, Slice
from egopatch.extract.errors import JobFailed
from egopatch.extract.worker.bottleneck import bottleneck_line, ceilings
from egopatch.features.common.command_line import INTERRUPTED, messages_apart, print_result
from egopatch.features.common.signals import REQUEUE, start_trackers
from egopatch.features.common.units import counted
from egopatch.features.state.counts import machines_line

if TYPE_CHECKING:
    from egopatch.extract.run import ExtractionResult

HELD = 3  # exit code of a job that has done its part, while other processes are still encoding shards of it


def main(parser: ConfigParser, args: Sequence[str], retry: bool = False) -> int:
    """Encode; returns 1 if the work failed, and `HELD` if shards are left."""
    parser.epilog = (
        "--config A.yaml B.yaml fills the stores of both from one decode of each clip; all other options apply to "
        "both. Exit codes: 0 all clips and questions are stored or quarantined; 1 the work failed; 2 wrong usage or "
        f"config; {HELD} other processes hold the shards that are left; {REQUEUE} interrupted by a scheduler's "
        f"signal; {INTERRUPTED} interrupted by Ctrl-C."
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait for shards that other processes hold, and encode what they leave"
    )
    parser.add_argument(
        "--shard", default="0/1", metavar="i/N", help="encode every N-th shard, starting with shard i; for job arrays"
    )
    parser.add_argument(
        "--refresh", action="store_true", help="encode again the clips whose stretch or video file has changed"
    )
    lines = split_configs(args)
    parsed = [parse_config(parser, line) for line in lines]
    configs, (_, options) = [config for config, _ in parsed], parsed[0]
    try:
        job_slice = Slice.parse(options.shard)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with messages_apart(options.json):
        code, results = encode(parser.prog, configs, lines, retry, job_slice, options.refresh, options.wait)
    if results:
        print_result(options.json, {"stores": as_records(configs, results)})
    return code


def encode(
    program: str,
    configs: Sequence[Config],
    lines: Sequence[Sequence[str]],
    retry: bool = False,
    job_slice: Slice = ALL_SHARDS,
    refresh: bool = False,
    wait: bool = False,
) -> "tuple[int, list[ExtractionResult]]":
    """Encode as `extract_together` does, and print the results.

    Args:
        program: Name of the command, for errors.
        configs: The experiments; as for `extract_together`, like the arguments that are not described here.
        lines: The command line of each config, from `--config` on, for the commands that messages suggest.

    Returns:
        The exit code of `extract run`, and a result for each config, none if the work failed.
    """
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.extract.run import extract_together
    from egopatch.extract.worker.device import arithmetic_advice, device_of

    for config in configs:
        if advice := arithmetic_advice(config, device_of(config.encoder.device)):
            print(f"advice: {advice}", flush=True)
    start_trackers()
    try:
        with experiment_named(*lines):
            results = extract_together(configs, retry, job_slice, refresh, wait)
    except JobFailed as error:
        print(f"{program}: failed: {error}. Committed shards are kept.", file=sys.stderr)
        return 1, []
    for config, result, line in zip(configs, results, lines, strict=True):
        _report(config, result, line)
    clips_left, texts_left = (sum(getattr(result, name) for result in results) for name in ("clips_left", "texts_left"))
    if clips_left or texts_left:
        print(
            f"{program}: {counted(clips_left, 'clip')} and {counted(texts_left, 'question')} are left, in shards "
            "that other processes hold; run the same command with --wait, or again when those processes have ended",
            file=sys.stderr,
        )
        return HELD, results
    return int(any((result.quarantine and not result.clips) or result.check.stale for result in results)), results


def as_records(configs: Sequence[Config], results: "Sequence[ExtractionResult]") -> list[dict[str, Any]]:
    """The record of each store that `--json` prints."""
    return [
        {
            "path": config.store.path,
            "clips": result.clips,
            "planned": result.planned,
            "others": result.others,
            "texts": result.texts,
            "encoded": result.stats.committed,
            "cut_short": result.stats.cut_short,
            "quarantine": result.quarantine,
            "clips_left": result.clips_left,
            "texts_left": result.texts_left,
            "reconstruction_error": result.reconstruction_error,
            "stale": result.check.stale,
            "unrecorded": result.check.unrecorded,
            "machines": result.machines,
            "ceilings": ceilings(result.stats),
        }
        for config, result in zip(configs, results, strict=True)
    ]


def split_configs(args: Sequence[str]) -> list[list[str]]:
    """One command line for each file in `--config A.yaml B.yaml`; each has all the other options.

    Raises:
        ConfigError: The files are not separated by spaces.
    """
    args = list(args)
    if "--config" not in args:
        return [args]
    first = args.index("--config") + 1
    files = list(itertools.takewhile(lambda value: not value.startswith("-"), args[first:]))
    if len(files) < 2:
        several = files[0].replace(",", " ").split() if files else []
        if len(several) > 1 and all(Path(file).is_file() for file in several):
            raise ConfigError(
                f"--config is {files[0]!r}; several files are separated by spaces: --config {' '.join(several)}"
            )
        return [args]
    return [[*args[:first], file, *args[first + len(files) :]] for file in files]


def _report(config: Config, result: "ExtractionResult", args: Sequence[str]) -> None:
    stats = result.stats
    complete = (result.clips, result.texts) == (result.planned, result.texts_planned)
    ending = ", nothing is missing" if complete and not stats.committed else ""
    print(
        f"{config.store.path}: {result.clips}/{result.planned} clips and {counted(result.texts, 'question')} stored;"
        f" this run encoded {counted(stats.committed, 'clip')}{ending}"
    )
    if result.others:
        print(others_line(result.others))
    if stats.stages.total_s:
        print(f"time: {stats.stages}")
    if line := bottleneck_line(ceilings(stats), stats.stages.starting):
        print(line)
    for array, error in result.reconstruction_error.items():
        print(f"{array} in {config.store.dtype}: reconstruction error {error:.2%} of their size (worst clip)")
    if stats.cut_short:
        later = counted(len(stats.cut_short), "clip ends later than its video", "clips end later than their videos")
        clip_id, missing_s = next(iter(stats.cut_short.items()))
        print(
            f"note: {later}, such as {clip_id} by {missing_s:.1f} s, and got frames up to the video's end; correct the"
            " annotations, or fetch the whole video"
        )
    for line in stats.skipped:
        print(f"skipped: {line}")
    for clip_id, reason in result.quarantine.items():
        print(f"quarantined {clip_id}: {reason}")
    if result.quarantine:
        print(after_quarantine(args))
    for line in [*result.check.lines(), *filter(None, [machines_line(result.machines)])]:
        print(name_experiment(line, args))
