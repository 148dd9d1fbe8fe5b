"""`features verify`: read back every committed clip, and hash the videos with `--sources`."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egopatch.features.commands.shared import CommandParser, progress, require_store
from egopatch.features.common.command_line import print_result
from egopatch.features.common.progress import BYTES
from egopatch.features.common.units import counted, format_bytes

if TYPE_CHECKING:
    from egopatch.features.tools.sources import SourceReport
    from egopatch.features.tools.verify import VerifyReport


def main(parser: CommandParser, args: Sequence[str]) -> int:
    """Name the bad clips; returns 1 if there are any, else 0."""
    parser.add_place()
    add_sources(parser, "name the changed ones")
    options = parser.parse_args(args)
    require_store(options.store)
    from egopatch.features.tools.verify import verify

    # The videos come first: a wrong folder should not show only once the whole store has been read.
    sources = check_sources(options) if options.sources else None
    with progress("verify", BYTES, options) as on_bytes:
        report = verify(options.store, on_bytes=on_bytes)
    ok, result, lines = report.ok, report_json(report), list(_report_lines(report))
    if sources:
        ok = ok and not (sources.changed or sources.unreadable)
        result["sources"] = asdict(sources)
        lines += _source_lines(sources, options)
    print_result(options.json, result, "\n".join(lines))
    return 0 if ok else 1


def add_sources(parser: CommandParser, then: str) -> None:
    """Add `--sources`; `then` says what the command does with changed videos."""
    parser.add_argument(
        "--sources",
        type=_folder,
        metavar="FOLDER",
        help=f"also hash the videos in this folder (the config's data.root), and {then}",
    )


def _folder(text: str) -> Path:
    with suppress(OSError):  # such as in a folder of another user
        if text and Path(text).is_dir():
            return Path(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a folder; expected the folder of the videos, data.root")


def check_sources(options: argparse.Namespace) -> "SourceReport":
    """Hash the videos in the folder `--sources`."""
    from egopatch.features.tools.sources import check_sources

    with progress("hash", BYTES, options) as on_bytes:
        return check_sources(options.store, options.sources, on_bytes=on_bytes)


def _source_lines(report: "SourceReport", options: argparse.Namespace) -> Iterator[str]:
    hashed = counted(report.files, "video")
    yield f"{options.sources}: {hashed} hashed, {len(report.changed)} changed, {report.gone} gone"
    for file, clips in report.changed.items():
        since = counted(len(clips), "clip was", "clips were")
        yield f"  {file} has changed since {since} encoded from it, such as {clips[0]!r}"
    for file, reason in report.unreadable.items():
        yield f"  {file} cannot be read: {reason}"
    if report.unrecorded:
        unchecked = (
            "clip cannot be checked: the store does not name its video",
            "clips cannot be checked: the store does not name their videos",
        )
        yield counted(report.unrecorded, *unchecked)
    if report.changed:
        yield (
            f"run `egopatch features repair {shlex.quote(str(options.store))} --sources "
            f"{shlex.quote(str(options.sources))}` to remove their clips, and then `egopatch extract run` to encode "
            "them again"
        )


def report_json(report: "VerifyReport") -> dict[str, Any]:
    """A report as JSON values."""
    return {
        "ok": report.ok,
        "clips": report.clips,
        "texts": report.texts,
        "shards": report.shards,
        "bytes": report.nbytes,
        "seconds": round(report.seconds, 3),
        "bad_clips": list(report.bad_clips),
        "faults": [asdict(fault) for fault in report.faults],
    }


def _report_lines(report: "VerifyReport") -> Iterator[str]:
    rows = counted(report.clips, "clip") + (f" and {counted(report.texts, 'text')}" if report.texts else "")
    shards = counted(report.shards, "shard")
    yield f"{report.path}: {rows} in {shards}, {format_bytes(report.nbytes)} in {report.seconds:.2f} s"
    for fault in report.faults:
        folder, slash, name = fault.where.rpartition("/")
        # A journal's faults name their file themselves.
        yield f"  {folder}{slash}{fault.what}" if fault.what.startswith(name) else f"  {fault.where} {fault.what}"
    texts = report.bad_texts
    for name in report.bad_clips:
        yield f"  bad {'text' if name in texts else 'clip'} {name!r}"
    if report.ok:
        yield "every committed clip reads back bit for bit"
    else:
        counts = f"{counted(len(report.faults), 'fault')}, {counted(len(report.bad_clips) - len(texts), 'bad clip')}"
        counts += f", {counted(len(texts), 'bad text')}" if texts else ""
        repair = f"features repair {shlex.quote(str(report.path))}"
        yield f"{counts}: run `egopatch {'extract run' if report.only_unfinished else repair}`"
