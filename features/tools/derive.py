"""Copying a store with only the highest-ranked patches of every frame."""

from dataclasses import replace

import torch
from torch import Tensor

from egopatch.features.storage.pick import storage_at
from egopatch.features.store.store import Store, open_store
from egopatch.features.store.text_substore import substores
from egopatch.features.tools.convert import OnProgress, Rows, copy_store, require_separate
from egopatch.features.values.errors import StoreError
from egopatch.features.values.location import Location, parse_location
from egopatch.features.values.spec import ArraySpec, Fingerprint, StoreSpec, keep_count

_MOST_PATCHES = 2**15


def derive(path: Location | str, to: Location | str, keep: float, on_clips: OnProgress | None = None) -> Store:
    """Keep the ceil(keep N) patches of each frame with the largest saliency, the largest first, ties to the lowest n.

    Selection of the most salient patches, at a ratio up to `keep`, therefore picks the same as in the full store.
    `positions` has each patch's index in the full grid; the fingerprint names the full store's. The text substore is
    copied, too.

    Raises:
        StoreError: `keep` is out of range, or `path` is not a full store of clips.
    """
    source, target = parse_location(path), parse_location(to)
    require_separate(source, target)
    if not 0 < keep <= 1:
        raise StoreError(f"--keep is {keep}; expected a share above 0 and at most 1")
    parent = open_store(source)
    if parent.spec.kind != "patches" or any(array.name == "positions" for array in parent.spec.arrays):
        raise StoreError(f"store {source} holds text or is derived already; expected a full store of clips")
    patches = parent.spec.array("patches").shape[1]
    if patches > _MOST_PATCHES:
        raise StoreError(f"store {source} has {patches} patches a frame; expected at most {_MOST_PATCHES} to derive")
    count = keep_count(keep, patches)
    whole = parent.fingerprint
    fingerprint = Fingerprint({**whole.fields, "parent": whole.digest, "derived_keep": keep, "derived_by": "saliency"})
    smaller = _smaller(parent.spec, count)
    copy_store(
        parent, target, smaller, fingerprint, change=lambda rows: _first_by_saliency(rows, count), on_clips=on_clips
    )
    for folder in substores(storage_at(source))[1:]:
        text = open_store(source / folder)
        copy_store(text, target / folder, text.spec, text.fingerprint)
    return open_store(target)


def _smaller(spec: StoreSpec, count: int) -> StoreSpec:
    """The spec with `count` patches a frame and their positions; the grid remains the full one."""
    arrays = [
        replace(array, shape=(array.shape[0], count, *array.shape[2:]))
        if array.name in ("patches", "saliency", "scale")
        else array
        for array in spec.arrays
    ]
    frames = spec.array("patches").shape[0]
    return replace(spec, arrays=(*arrays, ArraySpec("positions", (frames, count), "int16")))


def _first_by_saliency(rows: Rows, count: int) -> dict[str, Tensor]:
    """The `count` patches of each frame with the largest saliency, in falling order."""
    order = torch.sort(rows["saliency"], dim=-1, descending=True, stable=True).indices[..., :count]
    ranked = {name: rows[name].gather(2, order) for name in ("saliency", "scale") if name in rows}
    patches = rows["patches"]
    # As bytes, because torch cannot gather every stored dtype.
    bits = patches.view(torch.uint8)
    index = order.unsqueeze(-1).expand(*order.shape, bits.shape[-1])
    ranked["patches"] = bits.gather(2, index).view(patches.dtype)
    return {**rows, **ranked, "positions": order.to(torch.int16)}
