"""Checkpoints: the published containers load, whatever the training scripts pickled into them."""

import argparse
import pathlib
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from egopatch.extract.encoders import load_video_encoder
from egopatch.extract.encoders.checkpoints.checkpoint import CheckpointError, load_checkpoint
from egopatch.extract.encoders.inspection import inspect_checkpoint
from tests.extract.encoders.networks import CONTAINERS, tiny, write_container


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
def test_pickled_training_objects_are_dropped(
    tmp_path: Path, published_objects: dict[str, object], monkeypatch: pytest.MonkeyPatch, new_format: bool
) -> None:
    whole = dict(tiny(tmp_path).tensors)
    path = tmp_path / "published.pth"
    content = {"arch": "FrozenInTime", "state_dict": {f"module.{k}": v for k, v in whole.items()}} | published_objects
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    monkeypatch.delitem(sys.modules, "parse_config")
    loaded = load_checkpoint(path)
    assert loaded.container == "state_dict"
    assert loaded.tensors.keys() == whole.keys()
    assert all(torch.equal(loaded.tensors[name], whole[name]) for name in whole)


def test_numpy_scalars_in_older_files_load(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module.module.", "module._orig_mod.model."])
def test_every_container_and_prefix_loads(tmp_path: Path, container: str, prefix: str) -> None:
    whole = dict(tiny(tmp_path).tensors)
    path = write_container(tmp_path, container, {prefix + name: tensor for name, tensor in whole.items()})
    loaded = load_checkpoint(path)
    assert (loaded.container, loaded.network) == (container, "egovlpv2")
    assert loaded.tensors.keys() == whole.keys()


@pytest.mark.parametrize("key", ["model", "module", "model_state", "model_ema", "net"])
def test_a_network_is_found_under_any_key(tmp_path: Path, key: str) -> None:
    whole = dict(tiny(tmp_path).tensors)
    path = tmp_path / "file.pth"
    half = {name.replace("video_model.", "video_model._orig_mod."): tensor for name, tensor in whole.items()}
    other = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "scaler": {"scale": torch.ones(1)}}
    torch.save({"epoch": 3, "loss": torch.ones(1), **other, key: half}, path)
    loaded = load_checkpoint(path)
    assert (loaded.container, loaded.network) == (key, "egovlpv2")
    assert loaded.tensors.keys() == whole.keys()


def test_file_with_two_networks_is_refused_naming_their_keys(tmp_path: Path) -> None:
    whole = dict(tiny(tmp_path).tensors)
    path = tmp_path / "file.pth"
    torch.save({"model": whole, "model_ema": whole}, path)
    with pytest.raises(
        CheckpointError, match=r"file\.pth: holds a network under each of model, model_ema; expected one network"
    ):
        load_checkpoint(path)


def test_file_without_tensors_is_refused_naming_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"epoch": 3, "weights": {"inner": {"a": torch.ones(2)}}}, path)
    with pytest.raises(CheckpointError, match=r"holds no tensors under its keys \(epoch, weights\); expected"):
        load_checkpoint(path)


def test_names_of_an_unknown_network_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"model": {"model.a": torch.ones(2), "module.b": torch.ones(2)}}, path)
    assert load_checkpoint(path).tensors.keys() == {"model.a", "b"}


@pytest.mark.parametrize("names", [("a", "module.a"), ("module.a", "a")])
def test_tensor_name_with_and_without_module_prefix_is_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    path = tmp_path / "both.pth"
    torch.save({"state_dict": {name: torch.full((2,), float(n)) for n, name in enumerate(names)}}, path)
    with pytest.raises(CheckpointError, match=r"both\.pth: holds both 'a' and 'module\.a', which name the same tensor"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["file.pth", "file"])
def test_safetensors_load_by_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save_file({"module.a": torch.arange(5.0)}, path)
    loaded = load_checkpoint(path)
    assert loaded.container == "safetensors"
    assert torch.equal(loaded.tensors["a"], torch.arange(5.0))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"file\S*: not a readable safetensors file"):
        load_checkpoint(path)


def test_unknown_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.ones(2), "fc.bias": torch.ones(2)}, path)
    with pytest.raises(
        CheckpointError,
        match=r"resnet\.pth: this checkpoint of an unknown network \(tensors under bare: conv1\.weight, fc\.bias\) was",
    ):
        load_video_encoder("egovlpv2", path)
    with pytest.raises(
        CheckpointError,
        match=r"its tensors \(under bare: conv1.*\) belong to none of the published networks; expected EgoVLP, E",
    ):
        inspect_checkpoint(path)


def test_missing_and_reshaped_tensors_are_named(tmp_path: Path) -> None:
    whole = dict(tiny(tmp_path).tensors)
    path = tmp_path / "partial.pth"
    torch.save({k: v for k, v in whole.items() if "blocks.1." not in k}, path)
    with pytest.raises(CheckpointError, match=r"is missing video_model\.blocks\.1\.\S+, .* and 14 more"):
        load_video_encoder("egovlpv2", path, 3, 2)
    torch.save(whole | {"video_model.blocks.1.mlp.fc2.bias": torch.ones(5)}, path)
    with pytest.raises(CheckpointError, match=r"wrong shape: video_model\.blocks\.1\.mlp\.fc2\.bias is \(5,\), expe"):
        load_video_encoder("egovlpv2", path, 3, 2)
    found = inspect_checkpoint(path)
    assert found.reshaped == ("video_model.blocks.1.mlp.fc2.bias: (5,), expected (128,)",)
    assert not found.complete
