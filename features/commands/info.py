"""`features info`: how a store was made and how many clips it holds."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from egopatch.features.commands.shared import CommandParser, require_store
from egopatch.features.common.command_line import print_result
from egopatch.features.common.units import counted
from egopatch.features.state.catalog import Catalog
from egopatch.features.state.counts import machines_line
from egopatch.features.state.header import parse_header, read_header
from egopatch.features.state.quarantine import Quarantine
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.text_substore import TEXT_FOLDER, network_differences, substores
from egopatch.features.values.errors import NoStore
from egopatch.features.values.location import Location


def main(parser: CommandParser, args: Sequence[str]) -> int:
    """Print the facts of the store and of its text states; returns 0."""
    parser.add_place()
    options = parser.parse_args(args)
    require_store(options.store)
    clips = catalog_at(options.store)
    result = facts(clips)
    if TEXT_FOLDER in substores(storage_at(options.store)):
        try:
            texts = catalog_at(options.store / TEXT_FOLDER)
        except NoStore as error:
            print(f"note: {TEXT_FOLDER} is unfinished: {error}", file=sys.stderr)
        else:
            result[TEXT_FOLDER] = facts(texts)
            result["network_differences"] = network_differences(clips.header.fingerprint, texts.header.fingerprint)
    lines = [*_lines(result), *filter(None, [machines_line(clips.ledger.machines())])]
    print_result(options.json, result, "\n".join(lines))
    return 0


def catalog_at(location: Location) -> Catalog:
    """The catalog of a store, checked as `open_store` checks it."""
    storage = storage_at(location)
    header = parse_header(read_header(storage))
    return Catalog(storage, header)


def facts(catalog: Catalog) -> dict[str, Any]:
    """What `info` prints of one store, as JSON values."""
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


def _lines(result: dict[str, Any], indent: str = "") -> Iterator[str]:
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
