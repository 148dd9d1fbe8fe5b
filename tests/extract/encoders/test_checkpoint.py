"""Checkpoints: the published containers load, hostile and damaged files are refused, inspection says what is there."""

import argparse
import hashlib
import io
import json
import os
import pathlib
import pickle
import resource
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from extract.__main__ import main
from extract.encoders import load_video_encoder
from extract.encoders.checkpoint import CheckpointError, load_checkpoint
from extract.encoders.inspection import convert, inspect
from extract.encoders.standin import write_standin
from tests.extract.encoders.networks import TEXTS, formula_checkpoint, relative, sequence, tiny


def tensors(folder: Path) -> dict[str, Tensor]:
    return dict(tiny(folder).tensors)


@pytest.fixture
def published_objects(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What published files pickle beside their tensors; the training script's module exists only while saving."""
    module = types.ModuleType("parse_config")

    class ConfigParser:
        def __init__(self) -> None:
            self.save_dir = pathlib.PosixPath("/results/models")
            self.args = argparse.Namespace(local_rank=0, resume=None)
            self.config = {"arch": {"type": "FrozenInTime"}, "learning_rate": [1e-5]}

    ConfigParser.__module__, ConfigParser.__qualname__ = "parse_config", "ConfigParser"
    module.ConfigParser = ConfigParser  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parse_config", module)
    return {
        "config": ConfigParser(),
        "monitor_best": np.float64(0.25),
        "args": argparse.Namespace(lr=np.float32(1e-4)),
        "folder": pathlib.PosixPath("/data"),
    }


@pytest.mark.parametrize("new_format", [True, False])
def test_objects_of_the_training_scripts_are_dropped(
    tmp_path: Path, published_objects: dict[str, object], monkeypatch: pytest.MonkeyPatch, new_format: bool
) -> None:
    whole = tensors(tmp_path)
    path = tmp_path / "published.pth"
    content = {"arch": "FrozenInTime", "state_dict": {f"module.{k}": v for k, v in whole.items()}} | published_objects
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    monkeypatch.delitem(sys.modules, "parse_config")
    loaded = load_checkpoint(path)
    assert loaded.container == "state_dict"
    assert loaded.tensors.keys() == whole.keys()
    assert all(torch.equal(loaded.tensors[name], whole[name]) for name in whole)


def test_numpy_scalars_of_older_files(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "best": np.float64(3)}, path)
    # numpy renamed the module that its scalars are pickled under.
    data = path.read_bytes()
    assert b"numpy._core.multiarray" in data
    records = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            records[entry.filename] = archive.read(entry).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    assert torch.equal(load_checkpoint(path).tensors["a"], torch.ones(2))


CONTAINERS = ["state_dict", "model_state_dict", "bare", "safetensors"]


def write(folder: Path, container: str, named: dict[str, Tensor]) -> Path:
    """A checkpoint file with tensors in one of the containers."""
    path = folder / ("file.safetensors" if container == "safetensors" else "file.tar")
    if container == "safetensors":
        save_file(named, path)
    elif container == "bare":
        torch.save(named, path)
    else:
        torch.save({container: named, "optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}}}, path)
    return path


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_containers(tmp_path: Path, container: str, prefix: str) -> None:
    whole = tensors(tmp_path)
    path = write(tmp_path, container, {prefix + name: tensor for name, tensor in whole.items()})
    loaded = load_checkpoint(path)
    assert (loaded.container, loaded.network) == (container, "egovlpv2")
    assert loaded.tensors.keys() == whole.keys()


def test_files_from_before_the_zip_format(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"state_dict": {"module.a": torch.arange(5.0)}}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(path).tensors["a"], torch.arange(5.0))


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_does_not_run(tmp_path: Path, new_format: bool) -> None:
    path, target = tmp_path / "hostile.pth", tmp_path / "it_ran"
    content = {"state_dict": {"a": torch.ones(1)}, "config": Bomb(target)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"hostile\.pth: it holds posix\.system, which could run code; refused"):
        load_checkpoint(path)
    assert not target.exists()


def test_plain_pickle_does_not_run(tmp_path: Path) -> None:
    path, target = tmp_path / "hostile.pth", tmp_path / "it_ran"
    path.write_bytes(pickle.dumps({"state_dict": Bomb(target)}))
    with pytest.raises(CheckpointError, match=r"hostile\.pth: "):
        load_checkpoint(path)
    assert not target.exists()


def test_unknown_class_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("my_training")
    trainer = type("Trainer", (), {"__module__": "my_training"})
    module.Trainer = trainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_training", module)
    path = tmp_path / "mine.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, "trainer": trainer()}, path)
    with pytest.raises(CheckpointError, match=r"mine\.pth: it holds my_training\.Trainer"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    with pytest.raises(CheckpointError, match=r"no such checkpoint file; give encoder\.checkpoint the path of one"):
        load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty; download it again"):
        load_checkpoint(path)
    random = np.random.default_rng(0)
    for size in (1, 7, 100, 5000):
        path.write_bytes(random.bytes(size))
        with pytest.raises(CheckpointError, match="file"):
            load_checkpoint(path)
    content = {"a": torch.randn(1000)}
    torch.save(content, path) if suffix == ".pth" else save_file(content, path)
    whole = path.read_bytes()
    for keep in (10, 200, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match="file"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"a folder; give encoder\.checkpoint the path of a file in it"):
        load_checkpoint(tmp_path)


def test_stride_zero_tensor_that_claims_a_terabyte(tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    torch.save({"state_dict": {"a": torch.ones(1).expand(2**38)}}, path)
    assert path.stat().st_size < 5000
    with pytest.raises(CheckpointError, match=r"huge\.pth: tensor 'a' claims 274877906944 elements"):
        load_checkpoint(path)


def test_storage_that_claims_a_terabyte(tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    torch.save({"a": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(n for n in records if n.endswith("data.pkl"))
    # The pickle writes 4 once for the storage and once for the shape: BININT1 (K) 4.
    assert records[name].count(b"K\x04") == 2
    records[name] = records[name].replace(b"K\x04", b"\x8a\x06" + (2**40).to_bytes(6, "little"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, record in records.items():
            archive.writestr(entry, record)
    with pytest.raises(CheckpointError, match=r"huge\.pth: "):
        load_checkpoint(path)


def test_safetensors_that_claims_a_terabyte(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"huge\.safetensors: not a readable safetensors file"):
        load_checkpoint(path)


@pytest.mark.parametrize("numel", [2**33, 2**40])
def test_old_file_that_claims_more_than_it_has(tmp_path: Path, numel: int) -> None:
    path = tmp_path / "huge.pth"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    honest = path.read_bytes()
    assert honest.count(b"K\x04") >= 2  # of the storage and of the shape
    path.write_bytes(honest.replace(b"K\x04", b"\x8a\x06" + numel.to_bytes(6, "little")))
    with pytest.raises(CheckpointError, match=r"huge\.pth: damaged or no PyTorch checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "claimed"),
    [
        (b"{}", 2**63),
        (b"{}", 10**6),
        (b"[]", None),
        (b'{"a":{"dtype":"F31","shape":[4],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}', None),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None),
        (
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            None,
        ),
    ],
)
def test_lying_safetensors_headers(tmp_path: Path, header: bytes, claimed: int | None) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if claimed is None else claimed) + header + b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"lie\.safetensors: not a readable safetensors file"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.empty(2**38, device="meta"),
        pytest.param("quantised", marks=pytest.mark.filterwarnings("ignore")),
        pytest.param("nested", marks=pytest.mark.filterwarnings("ignore")),
    ],
    ids=["sparse", "a terabyte without data", "quantised", "nested"],
)
def test_tensors_of_other_kinds_are_refused(tmp_path: Path, tensor: Tensor | str) -> None:
    if tensor == "quantised":
        tensor = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    elif isinstance(tensor, str):
        tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    path = tmp_path / "odd.pth"
    torch.save({"state_dict": {"a": tensor}}, path)
    with pytest.raises(CheckpointError, match=r"odd\.pth: tensor 'a' is .* expected plain dense tensors"):
        load_checkpoint(path)


def test_a_bomb_of_zeros_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive, zipfile.ZipFile(path, "w") as out:
        for entry in archive.infolist():
            out.writestr(entry.filename, archive.read(entry))
        zeros = zipfile.ZipInfo("archive/data/2")
        zeros.compress_type = zipfile.ZIP_DEFLATED
        with out.open(zeros, "w") as record:
            for _ in range(256):
                record.write(bytes(2**20))
    assert path.stat().st_size < 2**19
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"bomb\.pth: record 'archive/data/2' is compressed"):
        load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    torch.save({"a": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive, zipfile.ZipFile(path, "w") as out:
        for entry in archive.infolist():
            out.writestr(entry.filename, archive.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"bomb\.pth: record .* is compressed"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, torch.ones(3), {"state_dict": [1]}])
def test_files_without_tensors_by_name_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other\.pth: holds (a|no) "):
        load_checkpoint(path)


def test_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.ones(2), "fc.bias": torch.ones(2)}, path)
    with pytest.raises(
        CheckpointError,
        match=r"resnet\.pth: this checkpoint of an unknown network was found where",
    ):
        load_video_encoder("egovlpv2", path)
    with pytest.raises(
        CheckpointError, match="its tensors are of no published network; expected EgoVLP, EgoVLPv2, MFAS"
    ):
        inspect(path)


def test_missing_and_reshaped_tensors_are_named(tmp_path: Path) -> None:
    whole = tensors(tmp_path)
    path = tmp_path / "partial.pth"
    torch.save({k: v for k, v in whole.items() if "blocks.1." not in k}, path)
    with pytest.raises(CheckpointError, match=r"lacks video_model\.blocks\.1\.\S+, .* and 14 more"):
        load_video_encoder("egovlpv2", path, 3, 2)
    torch.save(whole | {"video_model.blocks.1.mlp.fc2.bias": torch.ones(5)}, path)
    with pytest.raises(CheckpointError, match=r"re-shaped: video_model\.blocks\.1\.mlp\.fc2\.bias is \(5,\), expected"):
        load_video_encoder("egovlpv2", path, 3, 2)
    found = inspect(path)
    assert found.reshaped == ("video_model.blocks.1.mlp.fc2.bias: (5,), expected (128,)",)
    assert not found.complete


@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2", "mfas"])
def test_published_networks_are_recognised_whole(tmp_path: Path, arch: str) -> None:
    """Tiny files of every network: nothing missing, nothing unexpected."""
    path = tmp_path / "network.pth"
    torch.save({"state_dict": dict(tiny(tmp_path, arch).tensors)}, path)
    found = inspect(path)
    assert (found.missing, found.unexpected, found.reshaped) == ((), (), ())
    assert (found.blocks, found.frames, found.grid, found.width) == (4, 3, (4, 4), 128)
    assert found.fusion == (None if arch == "egovlp" else 2)
    assert "missing: 0" in found.lines()
    assert found.as_dict()["complete"] is True


@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2", "mfas"])
def test_names_and_shapes_are_those_of_the_published_files(arch: str) -> None:
    from extract.encoders.inspection import UNUSED, _expected
    from extract.encoders.video_encoder import VideoSizes

    published = formula_checkpoint(arch)
    shapes = {name: tuple(shape) for name, shape in published.tensors.shapes.items() if not UNUSED.match(name)}
    expected = _expected(published, VideoSizes.of(published), 6 if arch == "egovlp" else 12)
    assert dict(expected) == shapes


def test_inspect_tells_missing_and_unexpected(tmp_path: Path) -> None:
    whole = tensors(tmp_path)
    del whole["norm.bias"]
    path = tmp_path / "odd.pth"
    torch.save(whole | {"extra": torch.ones(1)}, path)
    found = inspect(path)
    assert (found.missing, found.unexpected) == (("norm.bias",), ("extra",))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing or re-shaped, the first is norm\.bias"):
        convert(path, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_convert_keeps_what_is_needed(tmp_path: Path) -> None:
    source = write_standin("egovlpv2", tmp_path / "a.pth", texts=TEXTS, frames=3, size=64).checkpoint
    out = tmp_path / "made" / "a.safetensors"
    found = convert(source, out)
    assert found.complete
    assert found.container == "safetensors"
    assert out.stat().st_size < source.stat().st_size
    assert not [name for name in load_checkpoint(out).tensors if name.startswith(("mlm_score", "itm_score"))]
    video = torch.randn(1, 3, 3, 64, 64)
    before, after = (load_video_encoder("egovlpv2", path, 3, 2)(video) for path in (source, out))
    assert relative(sequence(after), sequence(before)) == 0
    with pytest.raises(CheckpointError, match=r"expected a file name that ends in \.safetensors"):
        convert(source, tmp_path / "a.pth2")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2", "mfas"])
def test_the_commands_on_every_container(
    tmp_path: Path, container: str, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = dict(tiny(tmp_path, arch).tensors)
    path = write(tmp_path, container, {f"module.{name}": tensor for name, tensor in whole.items()})
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


def test_commands_on_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile, target = tmp_path / "hostile.pth", tmp_path / "it_ran"
    torch.save({"state_dict": {"a": torch.ones(1)}, "config": Bomb(target)}, hostile)
    (tmp_path / "empty.pth").touch()
    for action in ("inspect", "convert"):
        for path in (hostile, tmp_path / "empty.pth", tmp_path / "absent.pth", tmp_path):
            assert main(["checkpoint", action, str(path)]) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert str(path) in line
    assert not target.exists()
    assert not list(tmp_path.glob("*.safetensors*"))
