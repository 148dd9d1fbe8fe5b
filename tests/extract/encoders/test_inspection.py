"""What `checkpoint inspect` reports, and what `checkpoint convert` keeps."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from egopatch.extract.__main__ import main
from egopatch.extract.encoders import load_video_encoder
from egopatch.extract.encoders.checkpoints.checkpoint import CheckpointError, load_checkpoint
from egopatch.extract.encoders.checkpoints.standin import write_standin
from egopatch.extract.encoders.inspection import (
    UNUSED,
    CheckpointReport,
    _expected,
    convert_checkpoint,
    inspect_checkpoint,
)
from egopatch.extract.encoders.layers.spacetime import VideoSizes
from tests.extract.encoders.networks import (
    CONTAINERS,
    TEXTS,
    formula_checkpoint,
    relative,
    sequence,
    tiny,
    write_container,
)


@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2", "mfas"])
def test_published_networks_are_recognised_as_complete(tmp_path: Path, arch: str) -> None:
    """Tiny files of every network: nothing missing, nothing unexpected."""
    path = tmp_path / "network.pth"
    torch.save({"state_dict": dict(tiny(tmp_path, arch).tensors)}, path)
    found = inspect_checkpoint(path)
    assert (found.missing, found.unexpected, found.reshaped) == ((), (), ())
    assert (found.blocks, found.frames, found.grid, found.width) == (4, 3, (4, 4), 128)
    assert found.fusion == (None if arch == "egovlp" else 2)
    assert "missing tensors: 0" in found.lines()
    assert found.as_dict()["complete"] is True


@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2", "mfas"])
def test_expected_names_and_shapes_match_the_published_files(arch: str) -> None:
    published = formula_checkpoint(arch)
    shapes = {name: tuple(shape) for name, shape in published.tensors.shapes.items() if not UNUSED.match(name)}
    expected = _expected(published, VideoSizes.of(published))
    assert dict(expected) == shapes


def test_inspect_lists_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    whole = dict(tiny(tmp_path).tensors)
    del whole["norm.bias"]
    path = tmp_path / "odd.pth"
    torch.save(whole | {"extra": torch.ones(1)}, path)
    found = inspect_checkpoint(path)
    assert (found.missing, found.unexpected) == (("norm.bias",), ("extra",))
    with pytest.raises(CheckpointError, match=r"1 tensor is missing or of the wrong shape; .* norm\.bias"):
        convert_checkpoint(path, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_one_frame_block_and_layer_are_singular() -> None:
    path = Path("one.pth")
    found = CheckpointReport(path, 9, "", "bare", "EgoVLP", 8, 1, None, 1, 1, (1, 1), 16, 1, 1, 7, (), (), (), ())
    assert found.lines()[2:5] == [
        "1 video block, no fused blocks; 1 text layer; classifier of 1 answer",
        "1 frame of 16x16 pixels, 1x1 patches, 8 channels",
        "1 tensor, 7 parameters; 0 tensors are not used here",
    ]


def test_scalar_tensor_is_reported_with_the_wrong_shape(tmp_path: Path) -> None:
    name, path = "projector_2.weight", tmp_path / "odd.pth"
    torch.save({**tiny(tmp_path).tensors, name: torch.tensor(1.0)}, path)
    assert f"{name}: (), expected (0, 0)" in inspect_checkpoint(path).reshaped


def test_convert_keeps_what_is_needed(tmp_path: Path) -> None:
    source = write_standin("egovlpv2", tmp_path / "a.pth", texts=TEXTS, frames=3, size=64).checkpoint
    out = tmp_path / "made" / "a.safetensors"
    found = convert_checkpoint(source, out)
    assert found.complete
    assert found.container == "safetensors"
    assert out.stat().st_size < source.stat().st_size
    (tmp_path / "any").touch()
    assert out.stat().st_mode == (tmp_path / "any").stat().st_mode  # as the umask says
    assert not [name for name in load_checkpoint(out).tensors if name.startswith(("mlm_score", "itm_score"))]
    video = torch.randn(1, 3, 3, 64, 64)
    before, after = (load_video_encoder("egovlpv2", path, 3, 2)(video) for path in (source, out))
    assert relative(sequence(after), sequence(before)) == 0
    with pytest.raises(CheckpointError, match=r"expected a file name that ends in \.safetensors"):
        convert_checkpoint(source, tmp_path / "a.pth2")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2", "mfas"])
def test_inspect_and_convert_commands_handle_every_container(
    tmp_path: Path, container: str, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = dict(tiny(tmp_path, arch).tensors)
    path = write_container(tmp_path, container, {f"module.{name}": tensor for name, tensor in whole.items()})
    name = {"egovlp": "EgoVLP", "egovlpv2": "EgoVLPv2", "mfas": "MFAS"}[arch]
    assert main(["checkpoint", "inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["network"], found["container"], found["complete"]) == (name, container, True)
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    out = tmp_path / "out" / "small.safetensors"
    assert main(["checkpoint", "convert", str(path), "--out", str(out)]) == 0
    assert f"{out}: {name}" in capsys.readouterr().out
    kept = load_checkpoint(out).tensors
    assert kept
    assert all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())
    # Again, onto itself and beside: the same bytes, and the published file's sum in them.
    once = out.read_bytes()
    assert main(["checkpoint", "convert", str(out)]) == 0
    assert main(["checkpoint", "convert", str(out), "--out", str(tmp_path / "again.safetensors")]) == 0
    assert out.read_bytes() == (tmp_path / "again.safetensors").read_bytes() == once
    assert found["sha256"].encode() in once
