"""Small stores, and what was put into them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features import Fingerprint, Store, StoreSpec, create_store

FORMATS = ("zarr", "hdf5")
FINGERPRINT = Fingerprint({"checkpoint": "sha256:1", "depth": 6, "frames": 2})
SPEC = StoreSpec.for_patches(frames=2, grid=(2, 3), width=8, dtype="float16", shard=4)
IDS = tuple(f"vid|P{n}|0|10" for n in range(10))


def clip(seed: int, spec: StoreSpec = SPEC) -> dict[str, Tensor]:
    """One clip's tensors, as an encoder would give them."""
    generator = torch.Generator().manual_seed(seed)
    arrays = {array.name: torch.randn(array.shape, generator=generator) for array in spec.arrays}
    if "attention_mask" in arrays:
        arrays["attention_mask"] = arrays["attention_mask"] > 0
    return arrays


def fill(store: Store, skip: tuple[str, ...] = ()) -> dict[str, dict[str, Tensor]]:
    """Commit every missing clip but `skip`; returns what was written, by id."""
    written = {}
    for work in store.missing_shards():
        rows = {name: clip(store.planned_ids.index(name), store.spec) for name in work.ids if name not in skip}
        if rows:
            store.write_shard(work.shard, rows, {name: f"sha256:{name}" for name in rows})
        written |= rows
    return written


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(tmp_path: Path, format: str) -> Callable[..., Store]:
    def create(ids: tuple[str, ...] = IDS, spec: StoreSpec = SPEC, fingerprint: Fingerprint = FINGERPRINT) -> Store:
        return create_store(tmp_path / "store", spec, fingerprint, ids, format)

    return create
