"""Small stores, and what was put into them."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from egopatch.features import Fingerprint, Store, StoreSpec, create_store
from egopatch.features.values.location import Location
from tests.features.objects import bucket, environment, server

__all__ = ["bucket", "environment", "server"]

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


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files are in memory, if it has a folder: there an fsync, thousands in some tests, takes no time.

    A killed process loses as little there as on a disk: what it has written is the system's.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return request.param


def maker(place: Location | str, format: str) -> Callable[..., Store]:
    """What creates or grows the store at `place`."""

    def create(ids: tuple[str, ...] = IDS, spec: StoreSpec = SPEC, fingerprint: Fingerprint = FINGERPRINT) -> Store:
        return create_store(place, spec, fingerprint, ids, format)

    return create


@pytest.fixture
def make_local(tmp_path: Path, format: str) -> Callable[..., Store]:
    return maker(tmp_path / "store", format)


@pytest.fixture
def store(make_local: Callable[..., Store]) -> Store:
    """A full store in a folder, of each format."""
    store = make_local()
    fill(store)
    return store


@pytest.fixture(params=[*FORMATS, "objects"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Store]:
    """A store of every format in a folder, and one in object storage."""
    if request.param != "objects":
        return maker(tmp_path / "store", request.param)
    return maker(f"{request.getfixturevalue('bucket')}/store", "zarr")
