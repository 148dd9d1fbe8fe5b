"""`python -m features info|verify|repair|convert|derive STORE [--json]`: look at a store, check it, mend it, copy it.

Exit codes: 0 done; 1 faults were found, or the work failed; 2 wrong usage.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from egopatch.features.formats.registry import FORMATS
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.store import Store, open_store
from egopatch.features.store.text_substore import TEXT, halves, mismatches
from egopatch.features.tools.convert import convert
from egopatch.features.tools.derive import derive
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import Report, verify
from egopatch.features.values.errors import BadLocation, StoreError
from egopatch.features.values.location import Location, locate
from egopatch.features.values.spec import Codec, StoredDtype

Result = dict[str, Any]


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    parser = _parser()
    options = parser.parse_args(args)
    if isinstance(options.store, Path) and not options.store.is_dir():
        print(f"features: STORE is {str(options.store)!r}; expected the folder of a store", file=sys.stderr)
        return 2
    try:
        code, result, text = options.run(options)
    except BadLocation as error:
        print(f"features: {error}", file=sys.stderr)
        return 2
    except (StoreError, OSError) as error:
        message = " ".join(str(error).split())
        print(json.dumps({"error": message}) if options.json else f"features: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("features: interrupted; the store is as it was", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2) if options.json else text)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m features", description="Look at a store, check it, mend it, copy it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, about in (
        ("info", _info, "what the store is and what it holds"),
        (
            "verify",
            _verify,
            "exit 0 if every committed clip reads back bit for bit; else name the bad ones, exit 1",
        ),
        ("convert", _convert, "copy the store, text states included, to another format, dtype or shard size"),
        ("derive", _derive, "copy the store with only the patches of each frame that rank first"),
        ("repair", _repair, "take damaged clips out, so that `python -m extract run` encodes only them again"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("store", type=_location, metavar="STORE")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        if run in (_convert, _derive):
            command.add_argument("--to", type=_location, metavar="FOLDER", help="where to; beside STORE by default")
        if run is _convert:
            command.add_argument("--format", choices=list(FORMATS))
            command.add_argument("--dtype", choices=get_args(StoredDtype), help="of the tokens")
            command.add_argument("--shard", type=_count, metavar="N", help="clips to a shard")
            command.add_argument("--codec", choices=get_args(Codec), help="how rows are compressed; no value changes")
        if run is _derive:
            command.add_argument(
                "--keep", type=_share, required=True, metavar="SHARE", help="share of the patches kept"
            )
            command.add_argument("--by", choices=["saliency"], default="saliency", help="what ranks them")
    return parser


def _location(text: str) -> Location:
    try:
        return locate(text)
    except BadLocation as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share; expected a number above 0 and at most 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of clips; expected at least 1")
    return value


def _info(options: argparse.Namespace) -> tuple[int, Result, str]:
    clips, *texts = (open_store(options.store / half) for half in halves(storage_at(options.store)))
    result = _described(clips)
    for store in texts:
        result[TEXT] = _described(store)
        result["halves_differ"] = mismatches(clips, store)
    return 0, result, "\n".join(_lines(result))


def _described(store: Store) -> Result:
    quarantine = {name: asdict(record) for name, record in store.quarantine.items()}
    return {
        "path": str(store.path),
        "kind": store.spec.kind,
        "format": store.format,
        "committed": len(store.clip_ids),
        "planned": len(store.planned_ids),
        "missing": len(store.missing()),
        "bytes": store.nbytes,
        "codec": store.spec.codec,
        "compression_ratio": round(store.compression_ratio, 3),
        "shard": store.spec.shard,
        "arrays": {array.name: {"shape": array.shape, "dtype": array.dtype} for array in store.spec.arrays},
        "fingerprint": dict(store.fingerprint.fields),
        "digest": store.fingerprint.digest,
        "reconstruction_error": dict(store.reconstruction_error),
        "quarantine": quarantine,
    }


def _lines(result: Result, indent: str = "") -> Iterator[str]:
    for name, value in result.items():
        if name == "quarantine":
            yield f"{indent}{name}: {len(value)}"
            yield from (f"{indent}  {clip!r}: {one['reason']} ({one['attempts']} tries)" for clip, one in value.items())
        elif name == "arrays":
            yield f"{indent}{name}:"
            yield from (f"{indent}  {array}: {one['dtype']} {list(one['shape'])}" for array, one in value.items())
        elif isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {value}"


def _verify(options: argparse.Namespace) -> tuple[int, Result, str]:
    with _progress("verify", options.json) as on_bytes:
        report = verify(options.store, on_bytes=on_bytes)
    return (0 if report.ok else 1), _report(report), "\n".join(_report_lines(report))


def _report(report: Report) -> Result:
    return {
        "ok": report.ok,
        "clips": report.clips,
        "shards": report.shards,
        "bytes": report.nbytes,
        "seconds": round(report.seconds, 3),
        "bad_clips": list(report.bad_clips),
        "faults": [asdict(fault) for fault in report.faults],
    }


def _report_lines(report: Report) -> Iterator[str]:
    yield (
        f"{report.path}: {report.clips} clips in {report.shards} shards, {report.nbytes / 1e9:.3f} GB "
        f"in {report.seconds:.2f} s"
    )
    for fault in report.faults:
        yield f"  {fault.where} {fault.what}"
    for name in report.bad_clips:
        yield f"  bad clip {name!r}"
    if report.ok:
        yield "every committed clip reads back bit for bit"
    else:
        counts = f"{len(report.faults)} faults, {len(report.bad_clips)} bad clips"
        yield f"{counts}: run `python -m features repair {report.path}`"


def _repair(options: argparse.Namespace) -> tuple[int, Result, str]:
    done = repair(options.store)
    result = {"before": _report(done.before), "dropped": list(done.dropped), "rewritten": list(done.rewritten)}
    lines = [f"rewritten: {name}" for name in done.rewritten] + [f"taken out: {name!r}" for name in done.dropped]
    lines.append("run `python -m extract run` to encode what was taken out" if done.dropped else "nothing is missing")
    return 0, result, "\n".join(lines)


def _convert(options: argparse.Namespace) -> tuple[int, Result, str]:
    changes = [
        str(value) for value in (options.format, options.dtype, options.shard, options.codec) if value is not None
    ]
    to = options.to or options.store.with_name("_".join([options.store.name, *(changes or ["copy"])]))
    with _progress("convert", options.json, "clips") as on_clips:
        store = convert(
            options.store, to, options.format, options.dtype, options.shard, options.codec, on_clips=on_clips
        )
    return 0, _described(store), _copied(store, options.store)


def _derive(options: argparse.Namespace) -> tuple[int, Result, str]:
    to = options.to or options.store.with_name(f"{options.store.name}_keep{options.keep:g}")
    with _progress("derive", options.json, "clips") as on_clips:
        store = derive(options.store, to, options.keep, options.by, on_clips)
    return 0, _described(store), _copied(store, options.store)


def _copied(store: Store, source: Path) -> str:
    lines = [f"{store.path}: {len(store.clip_ids)} clips, {store.nbytes / 1e9:.3f} GB, from {source}"]
    lines += [
        f"{array}: reconstruction error {error:.2%} of their size (root mean square, worst clip)"
        for array, error in store.reconstruction_error.items()
    ]
    return "\n".join(lines)


@contextmanager
def _progress(what: str, quiet: bool, unit: str = "bytes") -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal; nothing in a file."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    figures = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    with Progress(BarColumn(), *figures, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
