"""A smaller store that keeps, of every frame, only the patches that rank first."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from egopatch.features.storage.pick import storage_at
from egopatch.features.store.store import Store, create_store, open_store
from egopatch.features.store.text_substore import halves
from egopatch.features.tools.convert import OnClips, Rows, refuse_same, transfer
from egopatch.features.values.errors import StoreError
from egopatch.features.values.location import Location, locate
from egopatch.features.values.spec import ArraySpec, Fingerprint, Scalar, StoreSpec

_RANKINGS = ("saliency",)
_MOST_PATCHES = 2**15


def derive(
    path: Location | str, to: Location | str, keep: float, by: str = "saliency", on_clips: OnClips | None = None
) -> Store:
    """Keep the ceil(keep N) patches of each frame with the largest saliency, the largest first, ties to the lowest n.

    So selecting by saliency at a ratio up to `keep` selects the same patches here as in the full store. Each patch's
    place in the grid is kept as `positions`; the fingerprint names its parent's, and the text states come along.

    Raises:
        StoreError: `keep` or `by` is none, or `path` is not a full store of clips.
    """
    source, target = locate(path), locate(to)
    refuse_same(source, target)
    if not 0 < keep <= 1:
        raise StoreError(f"--keep is {keep}; expected a share above 0 and at most 1")
    if by not in _RANKINGS:
        raise StoreError(f"--by is {by!r}; expected one of {', '.join(_RANKINGS)}")
    parent = open_store(source)
    if parent.spec.kind != "patches" or any(array.name == "positions" for array in parent.spec.arrays):
        raise StoreError(f"store {source} is of text or derived already; expected the full store of clips")
    patches = parent.spec.array("patches").shape[1]
    if patches > _MOST_PATCHES:
        raise StoreError(f"store {source} has {patches} patches a frame; expected at most {_MOST_PATCHES} to derive")
    count = math.ceil(keep * patches)
    origin: dict[str, Scalar] = {"parent": parent.fingerprint.digest, "derived_keep": keep, "derived_by": by}
    fingerprint = Fingerprint({**parent.fingerprint.fields, **origin})
    smaller = create_store(target, _smaller(parent.spec, count), fingerprint, parent.planned_ids, parent.format)
    transfer(parent, smaller, lambda rows: _first_by_saliency(rows, count), on_clips)
    for half in halves(storage_at(source))[1:]:
        text = open_store(source / half)
        copy = create_store(target / half, text.spec, text.fingerprint, text.planned_ids, text.format)
        transfer(text, copy, lambda rows: rows)
    return open_store(target)


def _smaller(spec: StoreSpec, count: int) -> StoreSpec:
    """The spec with `count` patches a frame and their positions; the grid stays that of the full frame."""
    arrays = [
        replace(array, shape=(array.shape[0], count, *array.shape[2:]))
        if array.name in ("patches", "saliency", "scale")
        else array
        for array in spec.arrays
    ]
    frames = spec.array("patches").shape[0]
    return replace(spec, arrays=(*arrays, ArraySpec("positions", (frames, count), "int16")))


def _first_by_saliency(rows: Rows, count: int) -> dict[str, Tensor]:
    """The first `count` patches of each frame, in falling order of saliency."""
    order = torch.sort(rows["saliency"], dim=-1, descending=True, stable=True).indices[..., :count]
    ranked = {name: rows[name].gather(2, order) for name in ("saliency", "scale") if name in rows}
    patches = rows["patches"]
    # Bytes, because not every stored dtype can be gathered.
    bits = patches.view(torch.uint8)
    index = order.unsqueeze(-1).expand(*order.shape, bits.shape[-1])
    ranked["patches"] = bits.gather(2, index).view(patches.dtype)
    return {**rows, **ranked, "positions": order.to(torch.int16)}
