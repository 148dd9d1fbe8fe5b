"""The Zarr layout is Zarr's own, and the fast reader equals zarr-python."""

import json
from dataclasses import replace
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from egopatch.features import ArraySpec, DamagedStore, Store, StoreSpec, create_store, open_store
from egopatch.features.formats.interface import CODECS
from egopatch.features.io.files import crc32c
from egopatch.features.tools.verify import verify
from egopatch.features.values.tensors import bytes_of, torch_dtype
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip, fill

MASK = ArraySpec("attention_mask", (1,), "bool")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS)


def test_zarr_python_opens_the_shard_layout(store: Store) -> None:
    fill(store)
    group = zarr.open_group(store.path, mode="r")
    patches = group["patches"]
    assert isinstance(patches, zarr.Array)
    assert patches.shape == (10, 2, 6, 8)
    assert patches.chunks == (1, 2, 6, 8)
    assert patches.shards == (4, 2, 6, 8)
    assert [type(codec).__name__ for codec in patches.compressors] == ["Crc32cCodec"]
    assert group.attrs["fingerprint"] == dict(FINGERPRINT.fields)


def test_other_tools_read_absent_rows_as_nan(store: Store) -> None:
    store.write_shard(1, {IDS[5]: clip(5)}, {IDS[5]: "sha256:5"})
    patches = zarr.open_array(store.path / "patches", mode="r")[:]
    assert np.isfinite(patches[5]).all()
    assert np.isnan(np.delete(patches, 5, axis=0)).all()


def test_bfloat16_is_stored_as_raw_bits(tmp_path: Path) -> None:
    spec = StoreSpec.for_patches(2, (2, 3), 8, "bfloat16", shard=4)
    store = create_store(tmp_path / "store", spec, FINGERPRINT, IDS)
    written = fill(store)
    array = zarr.open_array(store.path / "patches", mode="r")
    assert array.attrs["dtype"] == "bfloat16"
    bits = torch.from_numpy(np.asarray(array[3])).view(torch.bfloat16)
    assert torch.equal(bits, written[IDS[3]]["patches"].bfloat16())


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_reader_and_writer_equal_zarr_python(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["float16", "float32", "bfloat16", "bool"]))
    codec = data.draw(st.sampled_from(CODECS["zarr"]))
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    count, shard = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    ids = [f"clip{n}" for n in range(count)]
    written = data.draw(st.lists(st.sampled_from(ids), unique=True, min_size=1))
    spec = StoreSpec("text", (ArraySpec("states", shape, dtype), MASK), shard, codec=codec)
    folder = tmp_path_factory.mktemp("store")
    store = create_store(folder / "s", spec, FINGERPRINT, ids)
    generator = torch.Generator().manual_seed(count)
    for work in store.missing_shards():
        rows = {
            n: {
                "states": torch.randn(shape, generator=generator).to(torch_dtype(dtype)),
                "attention_mask": torch.ones(1, dtype=torch.bool),
            }
            for n in work.ids
            if n in written
        }
        store.write_shard(work.shard, rows, dict.fromkeys(rows, "sha256:0"))
    plain = zarr.open_array(store.path / "states", mode="r")[:]
    read = open_store(store.path).read_arrays(written)["states"]
    slow = np.ascontiguousarray(plain[[ids.index(name) for name in written]])
    assert bytes_of(read).tobytes() == slow.tobytes()
    assert_written_as_by_zarr_python(store, "states", folder / "theirs")


def assert_written_as_by_zarr_python(store: Store, array: str, scratch: Path) -> None:
    """Every row of `array` is byte for byte what zarr-python makes of the same values and metadata."""
    ours = zarr.open_array(store.path / array, mode="r")
    theirs = zarr.create_array(
        scratch,
        shape=ours.shape,
        chunks=ours.chunks,
        shards=ours.shards,
        dtype=ours.dtype,
        compressors=ours.compressors,
        filters=None,
        fill_value=ours.fill_value,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    theirs[:] = ours[:]
    assert (
        json.loads((scratch / "zarr.json").read_bytes())["codecs"]
        == json.loads((store.path / array / "zarr.json").read_bytes())["codecs"]
    )
    shards = list((store.path / array).glob("c.*"))
    assert shards
    for path in shards:
        assert chunks_of(scratch / path.name, ours.shards[0]) == chunks_of(path, ours.shards[0]), path.name


def index_of(path: Path, rows: int) -> np.ndarray:
    """Offset and size of each row of a shard."""
    return np.frombuffer(path.read_bytes()[-16 * rows - 4 : -4], "<u8").reshape(rows, 2)


def chunks_of(path: Path, rows: int) -> list[bytes | None]:
    """Each row of a shard as it lies there, with its checksum; None where there is none."""
    content = path.read_bytes()
    absent = 2**64 - 1
    return [None if at == absent else content[at : at + size] for at, size in index_of(path, rows).tolist()]


@pytest.mark.parametrize("codec", CODECS["zarr"])
def test_rows_match_zarr_python_byte_for_byte(tmp_path: Path, codec: str) -> None:
    spec = StoreSpec.for_patches(2, (8, 8), 64, "bfloat16", shard=4, codec=codec)
    store = create_store(tmp_path / "store", spec, FINGERPRINT, IDS)
    fill(store, skip=(IDS[5],))
    for array in spec.arrays:
        assert_written_as_by_zarr_python(store, array.name, tmp_path / "theirs" / array.name)
    assert (store.compression_ratio > 1.15) == (codec != "none")


def test_rows_are_aligned_to_64_bytes(tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", StoreSpec.for_patches(2, (8, 8), 64, shard=4), FINGERPRINT, IDS)
    fill(store, skip=(IDS[1],))
    for path in (store.path / "patches").glob("c.*"):
        offsets = index_of(path, 4)[:, 0]
        assert (offsets[offsets != 2**64 - 1] % 64 == 0).all()


@pytest.mark.parametrize("codec", ["zstd", "blosc-zstd"])
def test_a_row_that_decompresses_to_more_than_a_row_is_refused(tmp_path: Path, codec: str) -> None:
    store = create_store(tmp_path / "store", replace(SPEC, codec=codec), FINGERPRINT, IDS)
    fill(store)
    path = store.path / "patches" / "c.0.0.0.0"
    whole = numcodecs.Zstd() if codec == "zstd" else numcodecs.Blosc("zstd")
    row = whole.encode(np.zeros(2**24, np.uint8))  # 16 MiB in a few bytes
    row += crc32c(row).to_bytes(4, "little")
    index = np.full((4, 2), 2**64 - 1, "<u8")
    index[0] = 0, len(row)
    path.write_bytes(row + index.tobytes() + crc32c(index).to_bytes(4, "little"))
    with pytest.raises(DamagedStore, match=r"clip .*P0.* holds bytes that cannot be decompressed"):
        open_store(store.path).read([IDS[0]])
    assert verify(store.path).bad_clips == IDS[:4]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "has a damaged index"),
        (lambda b: b[:10], "has 10 bytes; expected at least 68, the size of its index"),
        (lambda b: b"", "has 0 bytes; expected at least 68, the size of its index"),
        (lambda b: b[:-20] + bytes([b[-20] ^ 1]) + b[-19:], "has a damaged index"),
        (lambda b: None, "cannot be opened: No such file"),
    ],
)
def test_damaged_files_are_named(store: Store, damage, message: str) -> None:
    fill(store)
    path = store.path / "patches" / "c.1.0.0.0"
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamagedStore, match=f"clip .*P4.* cannot be read: .*c.1.0.0.0 {message}"):
        open_store(store.path).read([IDS[0], IDS[4]])
