"""`python -m features info|verify|repair STORE [--json]`: look at a store, check it, mend it.

Exit codes: 0 done; 1 faults were found, or the work failed; 2 wrong usage.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from features.errors import StoreError
from features.repair import repair
from features.store import Store, open_store
from features.verify import TEXT, Report, verify

Result = dict[str, Any]


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    parser = _parser()
    options = parser.parse_args(args)
    if not options.store.is_dir():
        print(f"features: STORE is {str(options.store)!r}; expected the folder of a store", file=sys.stderr)
        return 2
    try:
        code, result, text = options.run(options)
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
    parser = argparse.ArgumentParser(prog="python -m features", description="Look at a store, check it, mend it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, about in (
        ("info", _info, "what the store is and what it holds"),
        (
            "verify",
            _verify,
            "exit 0 if every committed clip reads back bit for bit; else name the bad ones, exit 1",
        ),
        ("repair", _repair, "take damaged clips out, so that `python -m extract run` encodes only them again"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("store", type=Path, metavar="STORE")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    return parser


def _info(options: argparse.Namespace) -> tuple[int, Result, str]:
    result = _described(open_store(options.store))
    if (options.store / TEXT).is_dir():
        result["text"] = _described(open_store(options.store / TEXT))
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
        "shard": store.spec.shard,
        "arrays": {array.name: {"shape": array.shape, "dtype": array.dtype} for array in store.spec.arrays},
        "fingerprint": dict(store.fingerprint.fields),
        "digest": store.fingerprint.digest,
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
    with _progress("verify", quiet=options.json) as on_bytes:
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


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal; nothing in a file."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
