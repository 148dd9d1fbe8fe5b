"""Stage one from the command line: `python -m extract COMMAND --config configs/x.yaml`."""

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jsonargparse

from egopatch.configs.schema import Config, ConfigError, ConfigParser, add_config_arguments, parse_config
from egopatch.extract.datasets import DatasetError
from egopatch.extract.errors import CheckpointError
from egopatch.features.values.errors import BadLocation, FingerprintMismatch, StoreError

COMMANDS = {
    "plan": "say what a run would do: clips, bytes, time, refusals",
    "run": "encode every clip and question that the store misses",
    "status": "say how far the store has come",
    "retry": "try the quarantined clips again",
    "doctor": "check the annotations and look for every video; exits with 1 on faults",
    "data": "get the archives, checkpoints and tokenizers that the config needs",
    "standin": "write a tiny random-weight checkpoint and tokenizer where the config expects them",
    "synth": "render EgoSynth, the synthetic set in EgoTaskQA's layout",
    "checkpoint": "inspect or convert a checkpoint file",
}
INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 the work failed, 2 wrong usage or configuration."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        print(f"extract: error: {name!r} is no command; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _HANDLERS[name](rest)
    except (DatasetError, CheckpointError, ConfigError, BadLocation, FingerprintMismatch) as error:
        print(f"extract {name}: error: {error}", file=sys.stderr)
        return 2
    except (StoreError, OSError) as error:
        print(f"extract {name}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"extract {name}: stopped; what was committed is kept, run it again to go on", file=sys.stderr)
        return INTERRUPTED


def _usage() -> str:
    lines = [f"  {name:<11} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: python -m extract COMMAND [options]; COMMAND --help says more", *lines])


def _parse(command: str, args: Sequence[str], as_json: bool = False) -> tuple[Config, jsonargparse.Namespace]:
    parser = ConfigParser(prog=f"extract {command}", description=COMMANDS[command])
    if as_json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    if command == "plan":
        count = jsonargparse.typing.NonNegativeInt
        parser.add_argument(
            "--probe", type=count, default=4, help="clips to decode and encode for the estimate of time"
        )
        parser.add_argument("--clips", type=int | None, help="forecast a job of so many clips, without looking at data")
        parser.add_argument("--gpus", type=int, default=1, help="of the forecast")
        parser.add_argument("--cores", type=int, default=8, help="beside each GPU of the forecast, for decoding")
        parser.add_argument(
            "--clips-per-second",
            type=jsonargparse.typing.PositiveFloat | None,
            help="that one GPU encodes, for the forecast; default: as measured by the jobs on store.path",
        )
    if command in ("run", "retry"):
        parser.add_argument("--shard", default="0/1", metavar="i/N", help="every N-th shard from i on, for job arrays")
    add_config_arguments(parser)
    return parse_config(parser, args)


def _data(args: Sequence[str]) -> int:
    from egopatch.extract.fetch.download import DownloadError
    from egopatch.extract.fetch.lock import Lock
    from egopatch.extract.fetch.provide import as_json, describe, needs, provide
    from egopatch.extract.fetch.sources import PUBLISHED, load_sources
    from egopatch.extract.fetch.transfer_meter import transfer_meter

    parser = ConfigParser(prog="extract data", description=COMMANDS["data"])
    parser.add_argument("--offline", action="store_true", help="use no network; say which file to put where")
    parser.add_argument("--sources", type=Path, default=PUBLISHED, help="YAML file of links; its lock is beside it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config_arguments(parser)
    config, options = parse_config(parser, args)
    sources = load_sources(options.sources)
    lock = Lock(options.sources.with_suffix(".lock.json"))
    people = sys.stderr if options.json else sys.stdout
    try:
        outcomes = provide(
            needs(config, sources),
            lock,
            offline=options.offline,
            meter=lambda name, size: transfer_meter(name, size, people),
            say=lambda line: print(line, file=people, flush=True),
        )
    except DownloadError as error:
        print(f"extract data: failed: {error}", file=sys.stderr)
        return 1
    print(json.dumps(as_json(outcomes, lock), indent=1) if options.json else describe(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1


def _plan(args: Sequence[str]) -> int:
    from egopatch.extract.planning import forecast
    from egopatch.extract.planning.plan import describe, make_forecast, make_plan

    config, options = _parse("plan", args, as_json=True)
    if options.clips is not None:
        found = make_forecast(config, options.clips, options.gpus, options.cores, options.clips_per_second)
        print(json.dumps(dataclasses.asdict(found), indent=1) if options.json else forecast.describe(found))
        return 0
    plan = make_plan(config, options.probe)
    print(json.dumps(dataclasses.asdict(plan), indent=1) if options.json else describe(plan))
    return 1 if plan.refusals else 0


def _run(args: Sequence[str], retry: bool = False) -> int:
    from egopatch.extract.engines.dispatch import Part, WorkersKilled
    from egopatch.extract.engines.interrupts import REQUEUE, Requeue, requeue_on_signals
    from egopatch.extract.run import extract_features
    from egopatch.extract.worker.shard_writer import TooManyErrors
    from egopatch.extract.worker.worker import slow_arithmetic

    name = "retry" if retry else "run"
    config, options = _parse(name, args)
    try:
        part = Part.parse(options.shard)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if advice := slow_arithmetic(config):
        print(f"advice: {advice}", flush=True)
    try:
        with requeue_on_signals():
            outcome = extract_features(config, retry, part)
    except (TooManyErrors, WorkersKilled) as error:
        print(f"extract {name}: stopped: {error}. What was committed is kept.", file=sys.stderr)
        return 1
    except Requeue as notice:
        print(
            f"extract {name}: stopped by {notice}; what was committed is kept, run it again to go on", file=sys.stderr
        )
        return REQUEUE
    tally = outcome.tally
    print(
        f"{config.store.path}: {outcome.clips}/{outcome.planned} clips and {outcome.texts} questions stored;"
        f" this run encoded {tally.committed} clips"
    )
    if tally.stages.total_s:
        print(f"time: {tally.stages}")
    for array, lost in outcome.errors.items():
        print(f"{array} in {config.store.dtype}: reconstruction error {lost:.2%} of their size (worst clip)")
    for line in tally.skipped:
        print(f"left to its owner: {line}")
    for clip_id, reason in outcome.quarantine.items():
        print(f"quarantined {clip_id}: {reason}")
    return 1 if outcome.quarantine and not outcome.clips else 0


def _retry(args: Sequence[str]) -> int:
    return _run(args, retry=True)


def _status(args: Sequence[str]) -> int:
    from egopatch.features.state.counts import progress

    config, options = _parse("status", args, as_json=True)
    found = progress(config.store.path)
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        print(
            f"{config.store.path}: {found.committed}/{found.planned} clips committed, {found.quarantined} quarantined,"
            f" {found.missing} missing, {found.bytes / 1e6:.1f} MB"
        )
    return 0


def _doctor(args: Sequence[str]) -> int:
    from egopatch.extract.planning.doctor import describe, examine

    config, options = _parse("doctor", args, as_json=True)
    diagnosis = examine(config)
    print(json.dumps(dataclasses.asdict(diagnosis), indent=1) if options.json else describe(diagnosis))
    return 0 if diagnosis.sound else 1


def _standin(args: Sequence[str]) -> int:
    from egopatch.extract.datasets import load_dataset
    from egopatch.extract.encoders.checkpoints.standin import write_standin

    config, _ = _parse("standin", args)
    arch, path = config.encoder.arch, config.encoder.checkpoint
    if arch not in ("egovlp", "egovlpv2") or path is None:
        raise ConfigError(
            f"encoder.arch is {arch!r} and encoder.checkpoint {str(path)!r}; a stand-in is written for egovlp or"
            " egovlpv2 (from which mfas starts), to encoder.checkpoint"
        )
    depth = config.encoder.depth
    write_standin(
        arch,
        path,
        texts=load_dataset(config.data).texts,
        # EgoVLPv2 is tapped where fusion starts; one fused block above it is what a CPU trains in a demo's time.
        depth=depth + 1 if config.encoder.arch == "egovlpv2" else depth,
        fusion=depth,
        frames=config.video.frames,
        size=config.video.size,
        tokenizer=config.text.model,
    )
    print(
        f"{config.encoder.checkpoint}: a RANDOM-WEIGHT stand-in in {config.encoder.arch}'s file format;"
        f" {config.text.model}: its tokenizer. Nothing in it was trained."
    )
    return 0


def _synth(args: Sequence[str]) -> int:
    from egopatch.extract.datasets.egosynth.render import render

    parser = ConfigParser(prog="extract synth", description=COMMANDS["synth"])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in EgoTaskQA's layout")
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hard", action="store_true", help="small things, bystanders and clutter; see docs/egosynth.md"
    )
    options = parser.parse_args(list(args))
    from egopatch.extract.progress import meter

    with meter("render", options.clips, "clips") as shown:
        try:
            render(
                options.out,
                clips=options.clips,
                seed=options.seed,
                difficulty="hard" if options.hard else "plain",
                progress=lambda done, total: shown.advance(done - shown.done),
            )
        except ValueError as error:
            parser.error(str(error))
    return 0


def _checkpoint(args: Sequence[str]) -> int:
    from egopatch.extract.encoders.inspection import convert, inspect

    parser = ConfigParser(prog="extract checkpoint", description=COMMANDS["checkpoint"])
    parser.add_argument("action", choices=["inspect", "convert"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="safetensors file that convert writes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(args))
    if options.action == "inspect":
        found = inspect(options.file)
    else:
        found = convert(options.file, options.out or options.file.with_suffix(".safetensors"))
    print(json.dumps(found.as_dict(), indent=1) if options.json else "\n".join(found.lines()))
    return 0 if found.complete else 1


_HANDLERS: dict[str, Callable[[Sequence[str]], int]] = {
    "plan": _plan,
    "run": _run,
    "status": _status,
    "retry": _retry,
    "doctor": _doctor,
    "data": _data,
    "standin": _standin,
    "synth": _synth,
    "checkpoint": _checkpoint,
}


if __name__ == "__main__":
    sys.exit(main())
