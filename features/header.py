"""`store.json`: what the store is. Written once, with its own checksum."""

import json
from dataclasses import asdict
from pathlib import Path

from features.dtypes import stored
from features.durable import write_file
from features.errors import DamagedStore, StoreError
from features.journal import decode_line, encode_line
from features.spec import ArraySpec, Fingerprint, StoreSpec

VERSION = 1


def header_path(root: Path) -> Path:
    """Where it lies in the store at `root`."""
    return root / "store.json"


def make_header(spec: StoreSpec, fingerprint: Fingerprint, format_name: str) -> dict:
    """The header as JSON values."""
    for array in spec.arrays:
        stored(array.dtype)
    return json.loads(
        json.dumps(
            {
                "version": VERSION,
                "format": format_name,
                "spec": asdict(spec),
                "fingerprint": dict(fingerprint.fields),
            },
            sort_keys=True,  # as it will be read back, so that what repeats the header is the same bytes
        )
    )


def write_header(root: Path, header: dict) -> None:
    """Write it in one step."""
    write_file(header_path(root), encode_line(0, header))


def read_header(root: Path) -> dict:
    """Read it.

    Raises:
        StoreError: there is no store, or a newer version wrote it.
        DamagedStore: the file is damaged.
    """
    path = header_path(root)
    try:
        decoded = decode_line(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(
            f"no store at {root} ({path.name} is missing); expected a folder that `extract run` made"
        ) from None
    if decoded is None:
        raise DamagedStore(f"{path} is damaged; run `python -m features repair {root}`")
    header = decoded[1]
    if header["version"] != VERSION:
        raise StoreError(f"{path} has version {header['version']}; this program reads {VERSION}: update it")
    return header


def parse_header(header: dict) -> tuple[StoreSpec, Fingerprint, str]:
    """The dataclasses that the header describes.

    Raises:
        DamagedStore: it describes no store, whatever its checksum says.
    """
    try:
        spec = header["spec"]
        arrays = tuple(ArraySpec(a["name"], tuple(a["shape"]), a["dtype"]) for a in spec["arrays"])
        grid = tuple(spec["grid"]) if spec["grid"] else None
        parsed = StoreSpec(spec["kind"], arrays, spec["shard"], grid), Fingerprint(header["fingerprint"])
        sound = int(spec["shard"]) >= 1 and isinstance(header["fingerprint"], dict)
        for array in arrays:
            sound = sound and array.name.isidentifier()  # it becomes a file's name
            stored(array.dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedStore(f"store.json does not describe a store ({error}); this is not one of ours") from error
    if not sound:
        raise DamagedStore("store.json names arrays or a shard size that no store has; this is not one of ours")
    return *parsed, header["format"]


def differences(here: dict, there: dict) -> list[str]:
    """One line a field in which two headers differ: fingerprint fields by name, then format and spec."""
    lines = Fingerprint(here["fingerprint"]).differences(Fingerprint(there["fingerprint"]))
    if here["format"] != there["format"]:
        lines.append(f"format: {here['format']!r} here, {there['format']!r} there")
    lines += [
        f"spec.{name}: {here['spec'][name]!r} here, {there['spec'][name]!r} there"
        for name in here["spec"]
        if here["spec"][name] != there["spec"][name]
    ]
    return lines
