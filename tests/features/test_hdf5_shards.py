"""The HDF5 layout is plain HDF5, the fast reader equals h5py, and hostile files are refused."""

import fcntl
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from egopatch.features import ArraySpec, DamagedStore, Store, StoreSpec, create_store, open_store
from egopatch.features.formats import hdf5_shards
from egopatch.features.store import reader
from egopatch.features.tools.verify import verify
from egopatch.features.values.tensors import bytes_of, torch_dtype
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip, fill

SHARD = "shards/00000001.h5"
MASK = ArraySpec("attention_mask", (1,), "bool")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS, "hdf5")


def test_h5py_reads_the_shard_layout_and_the_index(store: Store) -> None:
    written = fill(store, skip=(IDS[5],))
    with h5py.File(store.path / SHARD) as file:
        assert file["patches"].chunks == (1, 2, 6, 8)
        assert file["patches"].fletcher32
        assert file["patches"].compression is None
    with h5py.File(store.path / "index.h5") as index:
        patches = index["patches"][:]
    assert patches.shape == (10, 2, 6, 8)
    assert np.isnan(patches[5]).all()  # never written, so no number
    assert np.array_equal(patches[9], written[IDS[9]]["patches"].half().numpy())


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 7)])
@pytest.mark.parametrize("codec", ["none", "gzip"])
def test_fast_reader_equals_h5py(tmp_path: Path, dtype: str, shape: tuple[int, ...], codec: str) -> None:
    spec = StoreSpec("text", (ArraySpec("states", shape, dtype), MASK), 3, codec=codec)
    ids = ["a", "b", "c", "d", "e"]
    store = create_store(tmp_path / "store", spec, FINGERPRINT, ids, "hdf5")
    for work in store.missing_shards():
        rows = {
            name: {"states": torch.randn(shape).to(torch_dtype(dtype)), "attention_mask": torch.ones(1).bool()}
            for name in work.ids
            if name != "c"
        }
        store.write_shard(work.shard, rows, dict.fromkeys(rows, "sha256:0"))
    requested = ["e", "a", "d", "b"]
    with h5py.File(store.path / "index.h5") as index:
        slow = index["states"][:][[ids.index(name) for name in requested]]
    fast = open_store(store.path).read_arrays(requested)["states"]
    assert bytes_of(fast).tobytes() == np.ascontiguousarray(slow).tobytes()


def test_h5py_opens_each_shard_only_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    written = fill(store, skip=(IDS[6],))
    opened: list[Path] = []

    class Counted(h5py.File):
        def __init__(self, path: Path, *args: object, **options: object) -> None:
            opened.append(path)
            super().__init__(path, *args, **options)

    monkeypatch.setattr(h5py, "File", Counted)
    monkeypatch.setattr(reader, "_OPEN_FILES", 1)  # as if the store had many
    store = open_store(store.path)
    for name in (*IDS[:6], *IDS[7:]) * 2:
        assert torch.equal(store.read([IDS[0], name]).patches[1], written[name]["patches"].half())
    assert len(opened) == 3
    open_store(store.path).write_shard(1, {IDS[6]: clip(6)}, {IDS[6]: "sha256:6"})
    opened.clear()
    store.catalog.refresh()
    assert torch.equal(store.read([IDS[0], IDS[6]]).patches[1], clip(6)["patches"].half())
    assert len(opened) == 1  # the file that has been replaced


def test_a_shard_locked_by_another_program_can_be_read(store: Store) -> None:
    fill(store)
    with (store.path / SHARD).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert len(open_store(store.path).read([IDS[4]]).cls) == 1
        assert verify(store.path).ok


def test_a_shard_open_with_locks_in_this_process_can_be_read(store: Store) -> None:
    written = fill(store)
    with h5py.File(store.path / SHARD) as mine:
        tokens = open_store(store.path).read([IDS[4]])
        assert np.array_equal(tokens.patches[0].numpy(), mine["patches"][0])
    assert torch.equal(tokens.patches[0], written[IDS[4]]["patches"].half())


def test_a_row_that_decompresses_to_more_than_a_row_is_refused(tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", replace(SPEC, codec="gzip"), FINGERPRINT, IDS, "hdf5")
    fill(store)
    with h5py.File(store.path / SHARD) as file:
        assert (file["patches"].compression, file["patches"].shuffle, file["patches"].fletcher32) == (
            "gzip",
            True,
            True,
        )
    with h5py.File(store.path / SHARD, "r+") as file:
        bomb = zlib.compress(bytes(2**24)) + b"four"
        file["patches"].id.write_direct_chunk((0, 0, 0, 0), bomb)
    with pytest.raises(
        DamagedStore, match=r"clip .*P4.*: the bytes of patches .* differ from those that were committed"
    ):
        open_store(store.path).read([IDS[4]])
    assert verify(store.path).bad_clips == (IDS[4],)


ROWS, LIKE_OURS = (4, 2, 6, 8), {"chunks": (1, 2, 6, 8), "fletcher32": True}


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (
            lambda file: file.update(patches=h5py.ExternalLink("elsewhere.h5", "patches")),
            "does not contain patches itself; links to other files are not followed",
        ),
        (
            lambda file: file.update(patches=h5py.SoftLink("/other")),
            "does not contain patches itself; links to other files are not followed",
        ),
        (
            lambda file: file.create_dataset("patches", ROWS, "f2", external=[("/etc/passwd", 0, 4 * 2 * 6 * 8 * 2)]),
            "keeps patches in other files; external storage is not followed",
        ),
        (
            lambda file: file.create_dataset("patches", (2**38, 2, 6, 8), "f2", **LIKE_OURS),
            "has patches of shape, dtype and chunk ((274877906944, 2, 6, 8)",
        ),
        (
            lambda file: file.create_group("patches"),
            "keeps patches in other files; external storage is not followed",
        ),
        (
            lambda file: file.create_dataset("patches", ROWS, "f2", compression="gzip", **LIKE_OURS),
            "has patches with filters that differ from codec 'none'",
        ),
    ],
)
def test_hostile_files_are_refused(store: Store, attack: Callable[[h5py.File], object], message: str) -> None:
    fill(store)
    shutil.copy(store.path / SHARD, (store.path / SHARD).with_name("elsewhere.h5"))
    with h5py.File(store.path / SHARD, "a") as file:
        file.move("patches", "other")
        attack(file)
    with pytest.raises(DamagedStore, match=f"clip 'vid.P4.*{re.escape(SHARD)} {re.escape(message)}"):
        open_store(store.path).read([IDS[4]])
    report = verify(store.path)
    assert report.bad_clips == IDS[4:8]
    assert len(open_store(store.path).read([IDS[0], IDS[9]]).cls) == 2


def test_a_file_that_is_not_hdf5_is_reported_as_damaged(store: Store) -> None:
    fill(store)
    (store.path / SHARD).write_bytes(b"not a store" * 100)
    with pytest.raises(DamagedStore, match=r"cannot be opened: .*file signature not found"):
        open_store(store.path).read([IDS[4]])


def test_a_row_missing_from_the_file_is_reported_as_damaged(store: Store, tmp_path: Path) -> None:
    fill(store)
    other = create_store(tmp_path / "other", SPEC, FINGERPRINT, IDS, "hdf5")
    other.write_shard(1, {IDS[5]: clip(5)}, {IDS[5]: "sha256:5"})
    (store.path / SHARD).write_bytes((other.path / SHARD).read_bytes())
    with pytest.raises(DamagedStore, match="has no row 0 of patches"):
        open_store(store.path).read([IDS[4]])
    assert len(open_store(store.path).read([IDS[5]]).cls) == 1


def test_rows_are_aligned_to_64_bytes(tmp_path: Path) -> None:
    spec = StoreSpec.for_patches(2, (8, 8), 64, shard=4)
    fill(create_store(tmp_path / "store", spec, FINGERPRINT, IDS, "hdf5"), skip=(IDS[1],))
    with h5py.File(tmp_path / "store" / "shards" / "00000000.h5") as file:
        offsets = [file["patches"].id.get_chunk_info(n).byte_offset for n in range(3)]
    assert all(offset % 64 == 0 for offset in offsets)


def test_offsets_are_those_of_the_file_that_is_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that is killed after it has put a new file in place leaves no commit that would tell readers of it."""
    fill(store)
    expected = store.read(IDS[5:8])
    shutil.copytree(store.path, tmp_path / "repaired")
    open_store(tmp_path / "repaired").rewrite_shard(1, without=IDS[4:5])
    new, open_h5 = [tmp_path / "repaired" / SHARD], hdf5_shards.open_unlocked

    def after_a_replacement(path: Path) -> h5py.File:
        if new:
            new.pop().replace(path)
        return open_h5(path)

    monkeypatch.setattr(hdf5_shards, "open_unlocked", after_a_replacement)
    read = open_store(store.path).read(IDS[5:8])
    assert torch.equal(read.patches, expected.patches)
    assert torch.equal(read.cls, expected.cls)
    assert not new
