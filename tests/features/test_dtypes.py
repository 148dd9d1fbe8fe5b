"""Quantised tokens: exact where possible, and with a reported error where not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from egopatch.features import FingerprintMismatch, Store, StoreError, StoreSpec, create_store, open_store
from egopatch.features.__main__ import main
from egopatch.features.values.dtypes import DISK_DTYPES, are_finite
from egopatch.features.values.encoding import dequantise, quantise, scale_of
from egopatch.features.values.tensors import torch_dtype
from tests.features.conftest import FINGERPRINT, FORMATS, IDS, clip, fill

WHOLE = StoreSpec.for_patches(2, (2, 3), 8, "float32", shard=4)


def quantised_store(root: Path, dtype: str, format: str = "zarr", coarse: int | None = None) -> Store:
    spec = StoreSpec.for_patches(2, (2, 3), 64, dtype, shard=4, coarse=coarse)
    return create_store(root, spec, FINGERPRINT, IDS, format)


def floats(n: int, store: Store) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in clip(n, store.spec).items() if name != "scale"}


@pytest.mark.parametrize("dtype", DISK_DTYPES)
def test_torch_dtypes_match_the_stored_dtypes_in_size_and_name(dtype: str) -> None:
    assert torch_dtype(dtype).itemsize == np.dtype(DISK_DTYPES[dtype].numpy).itemsize
    assert str(torch_dtype(dtype)).startswith(f"torch.{dtype}")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3"])
def test_every_non_finite_bit_pattern_is_detected(dtype: str) -> None:
    kind = torch.float64 if dtype == "float64" else torch_dtype(dtype)
    bits = 8 * kind.itemsize
    near = [top + step for top in (0, 0x7C00, 0x7F80, 0x7FF0, 0x7FFF, 0xFC00, 0xFF80, 0xFFF0) for step in (-1, 0, 1)]
    leading = [*range(0, 1 << 16, 97), *near] if bits > 8 else range(256)
    for pattern in (number % (1 << 16) << max(bits - 16, 0) for number in leading):
        row = np.zeros(9, f"u{kind.itemsize}")
        row[3] = pattern
        finite = bool(torch.from_numpy(row.view(np.uint8)).view(kind).double().isfinite().all())
        assert are_finite(row.view(np.uint8), dtype) == finite, hex(int(pattern))
    assert are_finite(np.zeros(0, np.uint8), dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "bound"), [("int8", 0.01), ("float8_e4m3", 0.04)])
def test_quantised_patches_read_back_within_the_dtype_rounding_error(
    tmp_path: Path, format: str, dtype: str, bound: float
) -> None:
    store = quantised_store(tmp_path / "store", dtype, format)
    rows = {name: floats(n, store) for n, name in enumerate(IDS[:4])}
    store.write_shard(0, rows, dict.fromkeys(rows, "x"))
    raw = store.read(IDS[:4])
    assert raw.scale is not None
    assert raw.patches.element_size() == 1
    given = torch.stack([rows[name]["patches"] for name in IDS[:4]])
    read = store.read(IDS[:4], dtype=torch.float32)
    assert read.scale is None
    step = raw.scale.unsqueeze(-1) / 2 if dtype == "int8" else given.abs() * 2**-4 + raw.scale.unsqueeze(-1) * 2**-9
    assert (torch.abs(read.patches - given) <= step * 1.001).all()
    lost = ((read.patches - given).square().mean((1, 2, 3)).sqrt() / given.square().mean((1, 2, 3)).sqrt()).max()
    assert store.reconstruction_error["patches"] == pytest.approx(float(lost), rel=1e-4)
    assert 0 < lost < bound


def test_info_shows_the_reconstruction_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = quantised_store(tmp_path / "store", "int8")
    assert main(["info", str(store.path)]) == 0
    assert "reconstruction_error" not in capsys.readouterr().out  # nor a heading without values
    store.write_shard(0, {IDS[0]: floats(0, store)}, {IDS[0]: "x"})
    assert main(["info", str(store.path)]) == 0
    assert "reconstruction_error:\n  patches: 0.00" in capsys.readouterr().out


def test_the_reconstruction_error_ignores_removed_clips(tmp_path: Path) -> None:
    store = quantised_store(tmp_path / "store", "int8")
    store.write_shard(0, {IDS[0]: floats(0, store)}, {IDS[0]: "x"})
    store.rewrite_shard(0, without=[IDS[0]])
    assert store.reconstruction_error == open_store(store.path).reconstruction_error == {}


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_extreme_patches_survive_quantisation(dtype: str) -> None:
    spec = StoreSpec.for_patches(1, (1, 4), 2, dtype)
    patches = torch.tensor([[[0.0, 1e-45], [1e-30, -1e-30], [3e38, 1.0], [-7.0, 7.0]]])
    scale = scale_of(patches, spec)
    assert torch.isfinite(scale).all()
    back = dequantise(quantise(patches, scale, dtype), scale, torch.float32)
    assert torch.equal(back[0, 0], torch.zeros(2))
    assert torch.allclose(back[0, 2:].amax(-1), patches[0, 2:].amax(-1), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_tokens_are_rounded_to_the_requested_dtype_once(
    dtype: str, target: torch.dtype, size: float, tmp_path: Path
) -> None:
    store = quantised_store(tmp_path / "store", dtype)
    row = floats(0, store)
    row["patches"] *= size
    store.write_shard(0, {IDS[0]: row}, {IDS[0]: "x"})
    read, exact = (store.read([IDS[0]], dtype).patches for dtype in (target, torch.float32))
    assert torch.equal(read, exact.to(target))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_non_finite_patches_are_refused_before_quantisation(dtype: str, number: float, tmp_path: Path) -> None:
    """NaN has no step: it would become some number of the stored dtype, and its patch would get the scale 1."""
    store = quantised_store(tmp_path / "store", dtype)
    row = floats(0, store)
    row["patches"][0, 0, 0] = number
    with pytest.raises(StoreError, match=r"clip 'vid\|P0\|0\|10': patches holds NaN or infinity"):
        store.write_shard(0, {IDS[0]: row}, {IDS[0]: "x"})


def test_already_quantised_tokens_are_kept_bit_for_bit(tmp_path: Path) -> None:
    store = quantised_store(tmp_path / "store", "int8")
    row = clip(0, store.spec)
    row["patches"] = torch.randint(-128, 128, row["patches"].shape, dtype=torch.int8)
    row["scale"] = row["scale"].abs()
    store.write_shard(0, {IDS[0]: row}, {IDS[0]: "x"})
    read = store.read([IDS[0]])
    assert torch.equal(read.patches[0], row["patches"])
    assert read.scale is not None
    assert torch.equal(read.scale[0], row["scale"])
    assert store.reconstruction_error == {}


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_stored_dtype_patches_without_a_scale_are_treated_as_plain_values(dtype: str, tmp_path: Path) -> None:
    store = quantised_store(tmp_path / "store", dtype)
    row = floats(0, store)
    row["patches"] = torch.full_like(row["patches"], 96.0).to(torch_dtype(dtype))
    store.write_shard(0, {IDS[0]: row}, {IDS[0]: "x"})
    assert torch.allclose(store.read([IDS[0]], torch.float32).patches, torch.tensor(96.0))


def test_coarse_tokens_stay_float16_beside_quantised_patches(tmp_path: Path) -> None:
    store = quantised_store(tmp_path / "store", "int8", coarse=3)
    row = floats(0, store)
    store.write_shard(0, {IDS[0]: row}, {IDS[0]: "x"})
    read = store.read([IDS[0]], dtype=torch.float32)
    assert read.coarse is not None
    assert torch.equal(read.coarse[0], row["coarse"].half().float())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_read_fills_the_given_buffers(tmp_path: Path, format: str, threads: int) -> None:
    store = create_store(tmp_path / "store", WHOLE, FINGERPRINT, IDS, format)
    fill(store)
    buffers = store.buffers(6)
    for requested in (IDS[:6], IDS[4:8], IDS[9:]):
        read = store.read(requested, out=buffers, threads=threads)
        assert read.patches.data_ptr() == buffers.patches.data_ptr()
        assert torch.equal(read.patches, open_store(store.path).read(requested).patches)
    with pytest.raises(StoreError, match=r"out has \(6, .*\) torch.float32 on cpu for patches; expected at least \(7"):
        store.read(IDS[:7], out=buffers)
    with pytest.raises(FingerprintMismatch):
        open_store(store.path, expect=type(FINGERPRINT)({}))
