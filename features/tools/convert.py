"""The same features in another format, dtype or shard size, in a store of their own."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from egopatch.features.state.quarantine import Failure
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.store import Store, create_store, open_store
from egopatch.features.store.text_substore import halves
from egopatch.features.values.dtypes import stored
from egopatch.features.values.errors import StoreError
from egopatch.features.values.location import Location, locate
from egopatch.features.values.spec import QUANTISED, TOKENS, ArraySpec, Codec, Fingerprint, StoreSpec

Rows = Mapping[str, Tensor]  # one tensor an array, the clips first
OnClips = Callable[[int, int], None]  # called with the clips done so far and in all


def convert(
    path: Location | str,
    to: Location | str,
    format: str | None = None,
    dtype: str | None = None,
    shard: int | None = None,
    codec: Codec | None = None,
    on_clips: OnClips | None = None,
) -> Store:
    """Copy the store at `path`, text states included, to `to`; what is not given stays as it is.

    Stopped and run again, it goes on where it was. Without another dtype every bit stays the same. With one, the
    fingerprint's `stored_dtype` changes, and where the values have been rounded before, it says so: a store that was
    written in that dtype at once would differ in the last bit.

    Raises:
        StoreError: `to` lies where a store of something else is, or a value does not fit the dtype.
    """
    source, target = locate(path), locate(to)
    refuse_same(source, target)
    for half in halves(storage_at(source)):
        store = open_store(source / half)
        spec, fingerprint = _converted_spec(store, dtype, None if half else shard, codec)
        copy = create_store(target / half, spec, fingerprint, store.planned_ids, format or store.format)
        requantised = spec.arrays != store.spec.arrays
        transfer(store, copy, lambda rows: rows, on_clips, decoded=requantised)
    return open_store(target)


def transfer(
    source: Store,
    target: Store,
    change: Callable[[Rows], Rows],
    on_clips: OnClips | None = None,
    decoded: bool = False,
) -> None:
    """Fill `target` with the clips of `source`, shard by shard, each batch of rows passed through `change`.

    Args:
        source: an open store.
        target: another, with the same ids.
        change: from arrays of `source` to arrays of `target`.
        on_clips: told how far it is.
        decoded: read the tokens as float32, multiplied by their scale, instead of bit for bit.
    """
    have, total = set(source.clip_ids), len(source.clip_ids)
    quarantined = source.quarantine
    for work in target.missing_shards():
        ids = [name for name in work.ids if name in have]
        rows: dict[str, dict[str, Tensor]] = {}
        if ids:
            arrays = change(source.read_arrays(ids, torch.float32 if decoded else None))
            rows = {n: {array: values[place] for array, values in arrays.items()} for place, n in enumerate(ids)}
        failures = {
            name: Failure(quarantined[name].reason, quarantined[name].traceback)
            for name in work.ids
            if name in quarantined
        }
        target.write_shard(work.shard, rows, source.sources(ids), failures)
        if on_clips is not None:
            on_clips(len(target.clip_ids), total)


def refuse_same(source: Location, target: Location) -> None:
    """Refuse to write a copy into the store that is copied.

    Raises:
        StoreError: names both.
    """
    inner, outer = (str(place.resolve() if isinstance(place, Path) else place) for place in (target, source))
    if f"{inner}/".startswith(f"{outer}/"):
        raise StoreError(f"--to is {str(target)!r}, inside the store {str(source)!r}; expected another folder")


def _converted_spec(
    store: Store, dtype: str | None, shard: int | None, codec: Codec | None
) -> tuple[StoreSpec, Fingerprint]:
    if shard is not None and shard < 1:
        raise StoreError(f"--shard is {shard}; expected at least 1")
    spec = replace(store.spec, shard=shard or store.spec.shard, codec=codec or store.spec.codec)
    kept = next(array.dtype for array in spec.arrays if array.name in TOKENS)
    if dtype is None or dtype == kept:
        return spec, store.fingerprint
    if spec.kind == "text" and dtype in QUANTISED:
        return spec, store.fingerprint  # the few states of questions stay as they are
    stored(dtype)
    changed = TOKENS if dtype not in QUANTISED else ("patches",)  # the few coarse tokens have no scale
    arrays = [replace(a, dtype=dtype) if a.name in changed else a for a in spec.arrays if a.name != "scale"]
    if dtype in QUANTISED:
        arrays.append(ArraySpec("scale", spec.array("patches").shape[:2], "float32"))
    fields = {**store.fingerprint.fields, "stored_dtype": dtype}
    if kept != "float32":
        fields["converted_from"] = kept
    return replace(spec, arrays=tuple(arrays)), Fingerprint(fields)
