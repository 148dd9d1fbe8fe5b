"""Copying a store to another format, dtype, shard size or codec."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from egopatch.features.formats.interface import CODECS
from egopatch.features.formats.registry import format_named
from egopatch.features.state.ledger import Provenance
from egopatch.features.state.quarantine import Failure
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.create import create_store
from egopatch.features.store.store import Store, open_store
from egopatch.features.store.text_substore import substores
from egopatch.features.values.dtypes import disk_dtype
from egopatch.features.values.errors import StoreError, WrongOption
from egopatch.features.values.location import Location, parse_location
from egopatch.features.values.spec import QUANTISED, TOKEN_ARRAYS, ArraySpec, Codec, Fingerprint, StoreSpec

Rows = Mapping[str, Tensor]  # array -> tensor, the batch of clips first
OnProgress = Callable[[int, int], None]  # called with the number of clips done and the number of all clips


def convert(
    path: Location | str,
    to: Location | str,
    format: str | None = None,
    dtype: str | None = None,
    shard: int | None = None,
    codec: Codec | None = None,
    on_clips: OnProgress | None = None,
) -> Store:
    """Copy the store at `path`, with its text substore, to `to`; None keeps a setting as it is.

    An interrupted copy resumes when it is run again. If the dtype stays, every bit stays the same. Otherwise the
    fingerprint's `stored_dtype` changes; if the values had been rounded before, `converted_from` records that, since a
    store encoded directly to the new dtype would differ in the last bits.

    Raises:
        FingerprintMismatch: A different store exists at `to`.
        WrongOption: The format does not have the codec.
        StoreError: A value does not fit the dtype, or a store cannot be read or written.
        ValueError: `shard` is below 1.
    """
    source, target = parse_location(path), parse_location(to)
    require_separate(source, target)
    _require_codec(open_store(source), format, codec)
    for folder in substores(storage_at(source)):
        store = open_store(source / folder)
        spec, fingerprint = _converted_spec(store, dtype, None if folder else shard, codec)
        copy_store(
            store,
            target / folder,
            spec,
            fingerprint,
            format,
            on_clips=None if folder else on_clips,
            decoded=spec.arrays != store.spec.arrays,
        )
    return open_store(target)


def copy_store(
    source: Store,
    to: Location,
    spec: StoreSpec,
    fingerprint: Fingerprint,
    format: str | None = None,
    change: Callable[[Rows], Rows] = lambda rows: rows,
    on_clips: OnProgress | None = None,
    decoded: bool = False,
) -> None:
    """Copy the clips and the quarantine of `source`, shard by shard, to the store at `to`, which may be begun already.

    Args:
        source: Store to copy from.
        to: Folder or URL of the copy, which the user names by `--to`.
        spec: Spec of the copy.
        fingerprint: Fingerprint of the copy.
        format: File format of the copy; None: that of `source`.
        change: Turns arrays of `source` into arrays of the copy, a batch of clips at a time.
        on_clips: Called after each shard.
        decoded: Read the tokens as float32, multiplied by their scale, instead of bit for bit.
    """
    target = create_store(to, spec, fingerprint, source.planned_ids, format or source.format, "--to")
    origins, quarantined, again = source.origins(), source.quarantine, _outdated(source, target)
    done = len(set(target.clip_ids) - again)
    for work in target.missing_shards(replace=again):
        ids = [name for name in work.ids if name in origins]
        rows: dict[str, dict[str, Tensor]] = {}
        made_of: dict[str, Provenance] = {}
        if ids:
            read = partial(source.read_arrays, ids, torch.float32 if decoded else None)
            stored, _ = source.catalog.read_unchanged(ids, read)
            made_of = source.catalog.ledger.provenance(ids)
            arrays = change(stored)
            rows = {name: {array: values[index] for array, values in arrays.items()} for index, name in enumerate(ids)}
        failures = {
            name: Failure(quarantined[name].reason, quarantined[name].traceback)
            for name in work.ids
            if name in quarantined
        }
        target.write_shard(
            work.shard,
            rows=rows,
            sources={name: row.source for name, row in made_of.items()},
            failures=failures,
            origins={name: row.origin for name, row in made_of.items() if row.origin is not None},
            replaces=work.replaces,
            machines={name: row.machine for name, row in made_of.items()},
        )
        if on_clips is not None:
            done += len(ids)
            on_clips(done, len(origins))


def _outdated(source: Store, target: Store) -> set[str]:
    """Clips of an earlier copy that `source` has encoded since, has encoded again, or has put in quarantine."""
    origins, quarantined = source.origins(), source.quarantine
    copied = {name: origin for name, origin in target.origins().items() if name in origins}
    sources, copied_sources = source.sources(list(copied)), target.sources(list(copied))
    return {
        *(name for name in target.quarantine if name in origins),
        *(name for name in target.clip_ids if name in quarantined),
        *(name for name in copied if (origins[name], sources[name]) != (copied[name], copied_sources[name])),
    }


def require_separate(source: Location, target: Location, option: str = "--to", what: str = "store") -> None:
    """Refuse to write a copy inside its source, where it would be taken for a part of it.

    Raises:
        StoreError: `target` is in `source`; the message names `option`, by which the user gave it, and `source` as a
            `what`.
    """
    inner, outer = (str(place.resolve() if isinstance(place, Path) else place) for place in (target, source))
    if f"{inner}/".startswith(f"{outer}/"):
        raise StoreError(f"{option} is {str(target)!r}, inside the {what} {str(source)!r}; expected one outside it")


def _require_codec(store: Store, format: str | None, codec: Codec | None) -> None:
    """Refuse a codec, requested or the store's own, that the copy's file format does not have."""
    name, wanted = format or store.format, codec or store.spec.codec
    format_named(name)  # refuses an unknown one
    if wanted not in CODECS[name]:
        given = f"--codec is {wanted!r}" if codec else f"--codec is not given, and the store's codec is {wanted!r}"
        raise WrongOption(f"{given}; expected one of {name}'s codecs: {', '.join(CODECS[name])}")


def _converted_spec(
    store: Store, dtype: str | None, shard: int | None, codec: Codec | None
) -> tuple[StoreSpec, Fingerprint]:
    shard = store.spec.shard if shard is None else shard
    spec = replace(store.spec, shard=shard, codec=codec or store.spec.codec)
    former = next(array.dtype for array in spec.arrays if array.name in TOKEN_ARRAYS)
    if dtype is None or dtype == former:
        return spec, store.fingerprint
    if spec.kind == "text" and dtype in QUANTISED:
        return spec, store.fingerprint  # text states are small and stay as they are
    disk_dtype(dtype)
    changed = TOKEN_ARRAYS if dtype not in QUANTISED else ("patches",)  # the few coarse tokens have no scale
    arrays = [replace(a, dtype=dtype) if a.name in changed else a for a in spec.arrays if a.name != "scale"]
    if dtype in QUANTISED:
        arrays.append(ArraySpec("scale", spec.array("patches").shape[:2], "float32"))
    fields = {**store.fingerprint.fields, "stored_dtype": dtype}
    if former != "float32":
        fields["converted_from"] = former
    return replace(spec, arrays=tuple(arrays)), Fingerprint(fields)
