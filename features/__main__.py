"""`egopatch features COMMAND STORE [--json]`: inspect, verify, repair and copy stores.

Exit codes: 0 done; 1 the work failed or found faults; 2 wrong usage; 130 interrupted.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from egopatch.interrupt import interrupts_in_one_line

with interrupts_in_one_line("features"):
    import argparse
    import shlex
    from dataclasses import asdict
    from pathlib import Path

    from egopatch.features.common.command_line import find_command, local_path, print_result, run_command
    from egopatch.features.common.units import counted, format_bytes
    from egopatch.features.formats.interface import CODECS
    from egopatch.features.state.catalog import Catalog
    from egopatch.features.state.counts import machines_line
    from egopatch.features.state.header import HEADER, parse_header, read_header
    from egopatch.features.state.quarantine import Quarantine
    from egopatch.features.storage.pick import storage_at
    from egopatch.features.store.text_substore import TEXT_FOLDER, network_differences, substores
    from egopatch.features.values.errors import BadLocation, FingerprintMismatch, StoreError, WrongOption
    from egopatch.features.values.location import Location, parse_location
    from egopatch.features.values.spec import Codec, StoredDtype

if TYPE_CHECKING:
    from egopatch.features.store.store import Store
    from egopatch.features.tools.sources import SourceReport
    from egopatch.features.tools.verify import VerifyReport

# The tools are imported by the commands that use them, to save start-up time: torch, Zarr and h5py take seconds, and
# neither help, nor `info`, nor the error about a wrong option needs them. So the names of `WRITERS` are repeated here.
EXPORTS = ("npy", "pt", "hdf5", "webdataset", "lmdb")

# Commands whose first argument need not be a store -> that argument's name and help.
FILES = "a store, or feature files: a folder or an HDF5 file"
PLACES = {"compare": ("A", FILES), "import": ("SOURCE", "a folder or an HDF5 file of features")}

Result = dict[str, Any]
Outcome = tuple[int, Result, str]  # exit code, the result as JSON values, the result as text


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    name = find_command(
        "features",
        {name: about for name, (_, about) in COMMANDS.items()},
        "egopatch features COMMAND STORE [options]; COMMAND --help lists its options",
        args,
    )
    if isinstance(name, int):
        return name

    def command() -> int:
        options = command_parsers()[name].parse_args(args[1:])
        if fault := _missing(name, options):
            raise BadLocation(fault)
        run, _ = COMMANDS[name]
        code, result, text = run(options)
        print_result(options.json, result, text)
        return code

    return run_command(
        f"features {name}",
        command,
        wrong_usage=(BadLocation, FingerprintMismatch, WrongOption),
        failures=(StoreError, OSError),
    )


class _Parser(argparse.ArgumentParser):
    """The parser of a command; its errors are one line."""

    def error(self, message: str) -> NoReturn:
        program = self.prog.removeprefix("egopatch ")
        print(f"{program}: error: {message}; `{self.prog} --help` describes it", file=sys.stderr)
        raise SystemExit(2)


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    added: dict[str, argparse.ArgumentParser] = {}
    for name, (_, about) in COMMANDS.items():
        added[name] = command = _Parser(prog=f"egopatch features {name}", description=about)
        metavar, help = PLACES.get(name, ("STORE", "folder or URL of the store"))
        command.add_argument("store", type=_location, metavar=metavar, help=help)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        if name in ("convert", "derive"):
            command.add_argument(
                "--to", type=_location, metavar="FOLDER", help="folder of the copy (default: beside STORE)"
            )
    added["convert"].add_argument("--format", choices=list(CODECS), help="file format of the copy")
    added["convert"].add_argument("--dtype", choices=get_args(StoredDtype), help="dtype of the tokens on disk")
    added["convert"].add_argument("--shard", type=_count, metavar="N", help="number of clips in a shard")
    added["convert"].add_argument("--codec", choices=get_args(Codec), help="lossless compression of each clip")
    added["unlock"].add_argument("--shard", type=int, metavar="N", help="number of the shard to unlock (default: all)")
    for name, then in (("verify", "name the changed ones"), ("repair", "remove the clips of the changed ones")):
        added[name].add_argument(
            "--sources",
            type=_folder,
            metavar="FOLDER",
            help=f"also hash the videos in this folder (the config's data.root), and {then}",
        )
    added["compare"].add_argument("other", type=_location, metavar="B", help=FILES)
    added["compare"].add_argument("--clips", type=_count, metavar="N", help="compare at most N clips")
    added["export"].add_argument("--to", choices=EXPORTS, required=True, help="kind of files to write")
    added["export"].add_argument(
        "--out", type=local_path, metavar="FOLDER", help="folder to create (default: beside STORE)"
    )
    added["export"].add_argument(
        "--pooled", action="store_true", help="write the mean of each frame's patches in their place"
    )
    added["export"].add_argument(
        "--by", choices=["clip", "video"], default="clip", help="one file or key per clip or per video"
    )
    added["import"].add_argument("--to", type=_location, required=True, metavar="STORE", help="store to create")
    added["import"].add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], default="float16", help="dtype of the patches on disk"
    )
    added["import"].add_argument(
        "--grid",
        type=_grid,
        metavar="ROWSxCOLS",
        help="grid of the patches (default: a square, if N is a square number)",
    )
    added["import"].add_argument("--shard", type=_count, default=64, metavar="N", help="number of clips in a shard")
    added["import"].add_argument("--format", choices=list(CODECS), default="zarr", help="file format of the store")
    added["derive"].add_argument(
        "--keep", type=_share, required=True, metavar="SHARE", help="share of each frame's patches to keep"
    )
    added["derive"].add_argument("--by", choices=["saliency"], default="saliency", help="score that ranks the patches")
    return added


def _missing(command: str, options: argparse.Namespace) -> str | None:
    """The fault of an argument that names what a command reads; None if there is no fault."""
    metavar, _ = PLACES.get(command, ("STORE", ""))
    places = {metavar: options.store} | ({"B": options.other} if command == "compare" else {})
    for name, place in places.items():
        if not isinstance(place, Path):
            if command == "import":
                return f"{name} is {str(place)!r}; expected a folder or an HDF5 file on this machine"
            continue
        if command in PLACES and not place.exists():
            return f"{name} is {str(place)!r}, which does not exist; expected {PLACES[command][1]}"
        if command not in PLACES and not place.is_dir():
            return f"{name} is {str(place)!r}; expected the folder of a store"
    return None


def _grid(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    if not (rows.isdecimal() and cols.isdecimal() and int(rows) and int(cols)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a grid; expected rows and columns, such as 14x14")
    return int(rows), int(cols)


def _location(text: str) -> Location:
    if not text:  # as a path it would be the current folder
        raise argparse.ArgumentTypeError("it is empty; expected a folder or a URL")
    try:
        return parse_location(text)
    except BadLocation as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _folder(text: str) -> Path:
    with suppress(OSError):  # such as in a folder of another user
        if text and Path(text).is_dir():
            return Path(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a folder; expected the folder of the videos, data.root")


def _share(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is out of range; expected a number above 0 and at most 1")


def _count(text: str) -> int:
    with suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text} is out of range; expected at least 1 clip")


def _info(options: argparse.Namespace) -> Outcome:
    storage = storage_at(options.store)
    clips, *texts = (_catalog(options.store / folder) for folder in substores(storage))
    result = _facts(clips)
    for catalog in texts:
        result[TEXT_FOLDER] = _facts(catalog)
        result["network_differences"] = network_differences(clips.header.fingerprint, catalog.header.fingerprint)
    return 0, result, "\n".join([*_lines(result), *filter(None, [machines_line(clips.ledger.machines())])])


def _catalog(location: Location) -> Catalog:
    """The catalog of a store, checked as `open_store` checks it."""
    storage = storage_at(location)
    header = parse_header(read_header(storage))
    return Catalog(storage, header)


def _facts(catalog: Catalog) -> Result:
    spec, header, ledger = catalog.spec, catalog.header, catalog.ledger
    quarantine = Quarantine(catalog.storage).read(ledger.clips)
    return {
        "path": str(catalog.root),
        "kind": spec.kind,
        "format": header.format,
        "committed": sum(name in ledger.clips for name in catalog.rows),
        "planned": len(catalog.rows),
        "missing": sum(name not in ledger.clips and name not in quarantine for name in catalog.rows),
        "bytes": ledger.nbytes,
        "codec": spec.codec,
        "compression_ratio": round(catalog.compression_ratio, 3),
        "shard": spec.shard,
        "arrays": {array.name: {"shape": array.shape, "dtype": array.dtype} for array in spec.arrays},
        "fingerprint": dict(header.fingerprint.fields),
        "digest": header.fingerprint.digest,
        "reconstruction_error": ledger.worst_errors(),
        "unrecorded": sum(origin is None for origin in ledger.origins().values()) if spec.kind == "patches" else 0,
        "machines": {name or "not recorded": clips for name, clips in ledger.machines().items()},
        "quarantine": {name: asdict(record) for name, record in quarantine.items()},
    }


def _lines(result: Result, indent: str = "") -> Iterator[str]:
    for name, value in result.items():
        if name == "quarantine":
            yield f"{indent}{name}: {len(value)}"
            for clip, record in value.items():
                yield f"{indent}  {clip!r}: {record['reason']} ({counted(record['attempts'], 'attempt')})"
        elif name == "arrays":
            yield f"{indent}{name}:"
            yield from (f"{indent}  {array}: {spec['dtype']} {list(spec['shape'])}" for array, spec in value.items())
        elif isinstance(value, dict):
            if value:
                yield f"{indent}{name}:"
                yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {value}"


def _verify(options: argparse.Namespace) -> Outcome:
    from egopatch.features.common.progress import BYTES
    from egopatch.features.tools.verify import verify

    with _progress("verify", BYTES, options) as on_bytes:
        report = verify(options.store, on_bytes=on_bytes)
    code, result, lines = 0 if report.ok else 1, _verify_result(report), list(_verify_lines(report))
    if options.sources:
        sources = _check_sources(options)
        code = 1 if sources.changed or sources.unreadable else code
        result["sources"] = asdict(sources)
        lines += _source_lines(sources, options)
    return code, result, "\n".join(lines)


def _check_sources(options: argparse.Namespace) -> "SourceReport":
    from egopatch.features.common.progress import BYTES
    from egopatch.features.tools.sources import check_sources

    with _progress("hash", BYTES, options) as on_bytes:
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


def _verify_result(report: "VerifyReport") -> Result:
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


def _verify_lines(report: "VerifyReport") -> Iterator[str]:
    rows = counted(report.clips, "clip") + (f" and {counted(report.texts, 'text')}" if report.texts else "")
    shards = counted(report.shards, "shard")
    yield f"{report.path}: {rows} in {shards}, {format_bytes(report.nbytes)} in {report.seconds:.2f} s"
    for fault in report.faults:
        yield f"  {fault.where} {fault.what}"
    for name in report.bad_clips:
        yield f"  bad clip {name!r}"
    if report.ok:
        yield "every committed clip reads back bit for bit"
    else:
        counts = f"{counted(len(report.faults), 'fault')}, {counted(len(report.bad_clips), 'bad clip')}"
        yield f"{counts}: run `egopatch features repair {shlex.quote(str(report.path))}`"


def _repair(options: argparse.Namespace) -> Outcome:
    from egopatch.features.tools.repair import repair

    sources = _check_sources(options) if options.sources else None
    if sources and (unreadable := next(iter(sources.unreadable.items()), None)):
        file, reason = unreadable
        raise StoreError(
            f"{file} cannot be read ({reason}), so it may have changed; nothing was repaired: make it readable, or "
            "repair without --sources"
        )
    done = repair(options.store, sources.clips if sources else ())
    result = {"before": _verify_result(done.before), "dropped": list(done.dropped), "rewritten": list(done.rewritten)}
    lines = [f"rewrote {name}" for name in done.rewritten] + [f"removed {name!r}" for name in done.dropped]
    lines.append("run `egopatch extract run` to encode the removed clips again" if done.dropped else "no clip was lost")
    return 0, result, "\n".join(lines)


def _unlock(options: argparse.Namespace) -> Outcome:
    storage = storage_at(options.store)
    folders = ("", TEXT_FOLDER) if options.shard is None else ("",)
    removed = [line for folder in folders for line in storage.subfolder(folder).unlock(options.shard)]
    # The folder of a run has a lease as well, but is not a store.
    if options.shard is not None and not removed and storage.exists(HEADER):
        catalog = _catalog(options.store)
        shards = max(map(catalog.shard_of, catalog.rows.values()), default=-1) + 1
        if not 0 <= options.shard < shards:
            present = f"{counted(shards, 'shard')}, counted from 0" if shards else "no shards"
            raise WrongOption(f"--shard is {options.shard}, but {options.store} has {present}")
    lines = [f"removed lease {line}" for line in removed]
    return 0, {"removed": removed}, "\n".join(lines or [f"{options.store} has no leases to remove"])


def _convert(options: argparse.Namespace) -> Outcome:
    from egopatch.features.tools.convert import convert

    changes = [
        str(value) for value in (options.format, options.dtype, options.shard, options.codec) if value is not None
    ]
    to = options.to or options.store.with_name("_".join([options.store.name, *(changes or ["copy"])]))
    with _progress("convert", "clips", options) as on_clips:
        store = convert(
            options.store, to, options.format, options.dtype, options.shard, options.codec, on_clips=on_clips
        )
    return 0, _facts(store.catalog), _copied(store, options.store)


def _derive(options: argparse.Namespace) -> Outcome:
    from egopatch.features.tools.derive import derive

    to = options.to or options.store.with_name(f"{options.store.name}_keep{options.keep:g}")
    with _progress("derive", "clips", options) as on_clips:
        store = derive(options.store, to, options.keep, on_clips)
    return 0, _facts(store.catalog), _copied(store, options.store)


def _compare(options: argparse.Namespace) -> Outcome:
    from egopatch.features.tools.compare import CLIPS, compare

    with _progress("compare", "clips", options) as on_clips:
        found = compare(options.store, options.other, options.clips or CLIPS, on_clips)
    lines = [
        found.verdict,
        f"clips: {found.clips} compared of {found.common} common, {found.only_a} only in A, {found.only_b} only in B",
        f"cosine {found.cosine:.6f}, relative error {found.error:.3g}",
    ]
    if found.times_differ_s is not None:
        lines.append(f"frame times differ by at most {found.times_differ_s:.3g} s")
    lines += [
        f"  {measure.name}: cosine {measure.cosine:.6f}, relative error {measure.error:.3g}"
        for measure in (*found.worst_clips, *found.worst_tokens, *found.worst_channels)
        if measure.error
    ]
    lines += [f"fingerprint: {line}" for line in found.fields]
    return 0 if found.agree else 1, asdict(found), "\n".join(lines)


def _export(options: argparse.Namespace) -> Outcome:
    from egopatch.features.tools.export import export

    out = options.out or Path(f"{Path(str(options.store)).name}_{options.to}")
    if options.out is None and isinstance(options.store, Path):
        out = options.store.with_name(out.name)
    with _progress("export", "clips", options) as on_clips:
        clips = export(options.store, out, options.to, options.pooled, options.by == "video", on_clips)
    written = f"{out}: {counted(clips, 'clip')} as {options.to}, from {options.store}"
    return 0, {"out": str(out), "clips": clips}, written


def _import(options: argparse.Namespace) -> Outcome:
    from egopatch.features.tools.importing import import_features

    with _progress("import", "clips, read twice", options) as on_clips:
        store = import_features(
            options.store, options.to, options.dtype, options.grid, options.shard, options.format, on_clips
        )
    hint = (
        "to train on this store, set encoder.arch to imported in a config, and encode the questions with "
        "`egopatch extract run --config CONFIG`"
    )
    return 0, _facts(store.catalog), f"{_copied(store, options.store)}\n{hint}"


def _copied(store: "Store", source: Location) -> str:
    lines = [f"{store.path}: {counted(len(store.clip_ids), 'clip')}, {format_bytes(store.nbytes)}, from {source}"]
    lines += [
        f"{array}: reconstruction error {error:.2%} (relative root mean square, worst clip)"
        for array, error in store.reconstruction_error.items()
    ]
    return "\n".join(lines)


@contextmanager
def _progress(label: str, unit: str, options: argparse.Namespace) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, on a terminal only; yields the function that updates it with units done and in all."""
    from egopatch.features.common.progress import ProgressDisplay

    silent = options.json or not sys.stderr.isatty()
    with ProgressDisplay(label, None, unit, out=sys.stderr, summary=False, silent=silent) as display:
        yield display.update


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], Outcome], str]] = {
    "info": (_info, "show how a store was made and how many clips it holds"),
    "verify": (_verify, "read back every committed clip; name the bad ones and exit with 1 if there are any"),
    "repair": (_repair, "remove damaged clips, so that `egopatch extract run` encodes exactly those again"),
    "convert": (_convert, "copy a store, with its text states, to another format, dtype, shard size or codec"),
    "unlock": (
        _unlock,
        "remove leases left by machines that are gone for good; refuses if a running process holds one",
    ),
    "compare": (
        _compare,
        "say whether two stores, or feature files, agree; if not, name the likely cause and exit with 1",
    ),
    "export": (_export, "write a store as files for other programs"),
    "import": (_import, "create a store from features that another program wrote"),
    "derive": (_derive, "copy a store with only the highest-ranked patches of each frame"),
}


if __name__ == "__main__":
    with interrupts_in_one_line("features"):
        sys.exit(main())
