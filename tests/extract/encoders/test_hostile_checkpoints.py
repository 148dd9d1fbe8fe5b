"""Files that are damaged, make false claims or would run code are refused in one line that names the file."""

import io
import os
import pickle
import resource
import struct
import sys
import types
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from egopatch.extract.__main__ import main
from egopatch.extract.encoders import load_text_encoder, load_video_encoder
from egopatch.extract.encoders.checkpoints.checkpoint import CheckpointError, load_checkpoint
from egopatch.extract.encoders.checkpoints.standin import write_standin
from egopatch.extract.encoders.inspection import inspect_checkpoint


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
    with pytest.raises(CheckpointError, match=r"does not exist; set encoder\.checkpoint to the path of a"):
        load_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="the file is empty; download it again"):
        load_checkpoint(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=f"{suffix} is a pointer of Git LFS, .*; run `git lfs pull` to fetch it"):
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
    with pytest.raises(CheckpointError, match=r"is a folder; set encoder\.checkpoint to the path of a file in it"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "before zip", "safetensors"])
def test_randomly_damaged_file_loads_or_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pth")
    content = {"a": torch.randn(7), "b": torch.arange(5)}
    if kind == "safetensors":
        save_file(content, path)
    else:
        torch.save({"state_dict": content, "epoch": 3}, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refusals = []
    for trial in range(600):
        data = np.frombuffer(whole, np.uint8).copy()
        if trial % 3 == 0:
            data = data[: random.integers(1, len(data))]
        data[random.integers(0, len(data), size=random.integers(1, 6))] = random.integers(0, 256)
        path.write_bytes(data.tobytes())
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 300
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in refusals)


def test_stride_zero_tensor_claiming_a_terabyte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.pth"
    torch.save({"state_dict": {"a": torch.ones(1).expand(2**38)}}, path)
    assert path.stat().st_size < 5000
    with pytest.raises(CheckpointError, match=r"huge\.pth: tensor 'a' claims 274877906944 elements"):
        load_checkpoint(path)


def test_storage_claiming_terabytes_is_refused(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("numel", [2**33, 2**40])
def test_legacy_file_claiming_more_data_than_it_has_is_refused(tmp_path: Path, numel: int) -> None:
    path = tmp_path / "huge.pth"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    honest = path.read_bytes()
    assert honest.count(b"K\x04") >= 2  # of the storage and of the shape
    path.write_bytes(honest.replace(b"K\x04", b"\x8a\x06" + numel.to_bytes(6, "little")))
    with pytest.raises(CheckpointError, match=r"huge\.pth: damaged or not a PyTorch checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "claimed"),
    [
        (b"{}", 2**63),
        (b"{}", 10**6),
        (b"[]", None),
        (b'{"a":{"dtype":"F31","shape":[4],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}', None),  # a terabyte
        (b'{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,16]}}', None),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}', None),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None),
        (
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            None,
        ),
    ],
)
def test_invalid_safetensors_headers_are_refused(tmp_path: Path, header: bytes, claimed: int | None) -> None:
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
def test_sparse_meta_quantised_and_nested_tensors_are_refused(tmp_path: Path, tensor: Tensor | str) -> None:
    if tensor == "quantised":
        tensor = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    elif isinstance(tensor, str):
        tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    path = tmp_path / "odd.pth"
    torch.save({"state_dict": {"a": tensor}}, path)
    with pytest.raises(CheckpointError, match=r"odd\.pth: tensor 'a' is .* expected plain dense tensors"):
        load_checkpoint(path)


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, torch.ones(3), {"state_dict": [1]}])
def test_files_without_named_tensors_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other\.pth: holds (a|no) "):
        load_checkpoint(path)


def test_checkpoint_commands_refuse_invalid_files_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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


@pytest.mark.parametrize("arch", ["egovlp", "egovlpv2"])
def test_tensors_with_wrong_dimensions_are_refused(arch: str, tmp_path: Path) -> None:
    standin = write_standin(arch, tmp_path / "whole.pth", texts=["what is it?"], width=64, depth=2, fusion=1, size=32)
    tensors = torch.load(standin.checkpoint, weights_only=True)["state_dict"]
    video = ["pos_embed", "temporal_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"]
    load_text = partial(load_text_encoder, arch, depth=1)
    for name, load in [
        *((f"video_model.{name}", inspect_checkpoint) for name in video),
        ("video_model.pos_embed", partial(load_video_encoder, arch, depth=1)),
        ("text_model.embeddings.word_embeddings.weight", load_text),
        ("text_model.embeddings.position_embeddings.weight", load_text),
    ]:
        assert f"module.{name}" in tensors
        torch.save({"state_dict": {**tensors, f"module.{name}": torch.zeros(())}}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=rf"wrong shape: {name} is \(\), expected \d dimensions"):
            load(tmp_path / "x.pth")
