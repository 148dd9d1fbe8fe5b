"""Features in other programs' file formats: an export and an import lose no bit."""

import io
import json
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from egopatch.features import StoreError, StoreSpec, create_store, open_store
from egopatch.features.__main__ import main
from egopatch.features.state.origin import Origin
from egopatch.features.tools import feature_files
from egopatch.features.tools.export import export
from egopatch.features.tools.feature_files import WRITERS, find_clips
from egopatch.features.tools.importing import import_features
from egopatch.features.tools.verify import verify
from tests.extract.job import contents
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip, fill
from tests.features.faults import before_a_shard_is_opened

NAMES = ("P01/P01_01", *(f"cut 3.5|P{n}" for n in range(5)))


def write(folder: Path, shape: tuple[int, ...] = (2, 4, 8), names: tuple[str, ...] = NAMES) -> Path:
    """A folder of npy files, as another program leaves it."""
    folder.mkdir()
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        np.save(folder / f"{name}.npy", np.random.default_rng(number).normal(size=shape).astype(np.float32))
    return folder


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_import_export_import_round_trip_gives_equal_bytes(kind: str, dtype: str, tmp_path: Path) -> None:
    files = write(tmp_path / "files")
    first = import_features(files, tmp_path / "first", dtype)
    assert export(first.path, tmp_path / "exported", kind) == len(NAMES)
    second = import_features(tmp_path / "exported", tmp_path / "second", dtype)
    assert first.clip_ids == second.clip_ids == NAMES
    assert first.fingerprint == second.fingerprint
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert first.sources(NAMES) == second.sources(NAMES)
    assert verify(second.path).ok


def test_import_derives_cls_and_saliency_from_the_patches(tmp_path: Path) -> None:
    files = write(tmp_path / "files")
    store = import_features(files, tmp_path / "store", "float32")
    tokens = store.read(NAMES)
    given = torch.stack([torch.from_numpy(np.load(files / f"{name}.npy")) for name in NAMES])
    assert torch.equal(tokens.patches, given)
    assert torch.allclose(tokens.cls, given.mean((1, 2)))
    assert torch.allclose(tokens.saliency, given.norm(dim=-1))
    assert tokens.timestamps is None
    assert store.spec.grid == (2, 2)
    assert store.fingerprint.fields["origin"] == "imported"
    np.save(files / f"{NAMES[3]}.npy", np.ones((2, 4, 8), np.float32))
    with pytest.raises(StoreError, match=r"different settings.*content"):
        import_features(files, tmp_path / "store", "float32")


@pytest.mark.parametrize(
    ("shape", "grid", "stored", "expected"),
    [
        ((8,), None, (1, 1, 8), (1, 1)),
        ((3, 8), None, (3, 1, 8), (1, 1)),
        ((3, 6, 8), None, (3, 6, 8), (1, 6)),
        ((3, 6, 8), (2, 3), (3, 6, 8), (2, 3)),
        ((3, 3, 2, 8), None, (3, 6, 8), (3, 2)),
    ],
)
def test_imported_feature_shapes_map_to_patches_and_a_grid(
    shape: tuple[int, ...], grid: tuple[int, int] | None, stored: object, expected: object, tmp_path: Path
) -> None:
    store = import_features(write(tmp_path / "files", shape), tmp_path / "store", grid=grid)
    assert store.spec.array("patches").shape == stored
    assert store.spec.grid == expected


@pytest.mark.parametrize("kind", ["pt", "hdf5", "webdataset", "lmdb"])
def test_export_and_import_keep_every_array(kind: str, tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS)
    fill(store)
    export(store.path, tmp_path / "files", kind)
    again = import_features(tmp_path / "files", tmp_path / "again")
    assert set(again.clip_ids) == set(IDS)
    for name, tensor in store.read(IDS).tensors().items():
        assert torch.equal(again.read(IDS).tensors()[name], tensor), name


def test_exports_are_dequantised_and_optionally_pooled(tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", StoreSpec.for_patches(2, (2, 3), 8, "int8", 4), FINGERPRINT, IDS)
    for work in store.missing_shards():
        rows = {name: clip(n) for n, name in enumerate(work.ids)}
        store.write_shard(work.shard, rows, dict.fromkeys(rows, "sha"))
    whole = store.read(IDS, torch.float32).patches
    export(store.path, tmp_path / "whole", "npy")
    assert np.array_equal(np.load(tmp_path / "whole" / f"{IDS[3]}.npy"), whole[3].numpy())
    export(store.path, tmp_path / "pooled", "pt", pooled=True)
    pooled = torch.load(tmp_path / "pooled" / f"{IDS[3]}.pt", weights_only=True)
    assert torch.allclose(pooled["patches"], whole[3].mean(1, keepdim=True))
    assert pooled.keys() == {"patches", "cls", "timestamps"}


def test_export_by_video_joins_the_clips_of_each_video(tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS[:4])
    rows = {name: clip(n) | {"timestamps": torch.tensor([0.5, 1.5])} for n, name in enumerate(IDS[:4])}
    starts = {IDS[0]: ("a/x.mp4", 4.0), IDS[1]: ("b.mp4", 0.0), IDS[2]: ("a/x.mp4", 2.0), IDS[3]: ("a/x.mp4", 8.0)}
    origins = {name: Origin(file, 1, start, start + 2) for name, (file, start) in starts.items()}
    store.write_shard(0, rows, dict.fromkeys(rows, "sha"), origins=origins)
    assert export(store.path, tmp_path / "videos", "hdf5", by_video=True) == 4
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["a_x.mp4.h5", "b.mp4.h5"]
    with h5py.File(tmp_path / "videos" / "a_x.mp4.h5") as file:
        assert file["timestamps"][()].tolist() == [2.5, 3.5, 4.5, 5.5, 8.5, 9.5]
        order = [IDS[2], IDS[0], IDS[3]]
        assert np.array_equal(file["patches"][()], store.read(order).patches.flatten(0, 1).numpy())
        assert np.array_equal(file["cls"][()], store.read(order).cls.numpy())
    with pytest.raises(StoreError, match=r"cls has shape \(3, 8\); expected \(8,\) .*; if .* export it with --by clip"):
        import_features(tmp_path / "videos", tmp_path / "again")
    elsewhere = create_store(tmp_path / "elsewhere", SPEC, FINGERPRINT, IDS[:4])
    away = {name: replace(origin, file=f"/mnt/my videos/{origin.file}") for name, origin in origins.items()}
    elsewhere.write_shard(0, rows, dict.fromkeys(rows, "sha"), origins=away)
    assert export(elsewhere.path, tmp_path / "away", "npy", by_video=True) == 4
    assert sorted(path.name for path in (tmp_path / "away").iterdir()) == ["a_x.mp4.npy", "b.mp4.npy"]
    nameless = create_store(tmp_path / "nameless", SPEC, FINGERPRINT, IDS[:4])
    fill(nameless)
    with pytest.raises(StoreError, match="does not record the video of 4 clips, such as"):
        export(nameless.path, tmp_path / "none", "npy", by_video=True)


@pytest.mark.parametrize("moved", [False, True])
def test_export_by_video_takes_rows_and_times_from_one_commit(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, [IDS[0], *IDS[4:8]])
    ids, origins = store.planned_ids, {name: Origin("x.mp4", 1, float(n)) for n, name in enumerate(store.planned_ids)}

    def write(seed: int, origins: dict[str, Origin], *ids: str) -> None:
        writer = open_store(store.path)
        for work in writer.missing_shards(replace=ids):
            rows = {name: clip(seed) | {"timestamps": torch.full((2,), float(seed))} for name in work.ids}
            writer.write_shard(work.shard, rows, dict.fromkeys(rows, str(seed)), {}, origins, work.replaces)

    write(0, origins, *ids)
    again = {name: replace(origin, start_s=50.0) for name, origin in origins.items()} if moved else origins
    # The last row is in the second shard: when that is opened, the first shard has been read.
    before_a_shard_is_opened(monkeypatch, 1, lambda: write(9, again, ids[0], ids[4]))
    if moved:
        with pytest.raises(StoreError, match=r"^clip 'vid.P0.0.10' was encoded again .*; run the same command again$"):
            export(store.path, tmp_path / "videos", "pt", by_video=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
        return
    export(store.path, tmp_path / "videos", "pt", by_video=True)
    written = torch.load(tmp_path / "videos" / "x.mp4.pt", weights_only=True)
    assert written["timestamps"].tolist() == [t for n in range(5) for t in [n + (9.0 if n in (0, 4) else 0.0)] * 2]
    assert torch.equal(written["patches"], open_store(store.path).read(ids).patches.flatten(0, 1))


def test_a_webdataset_has_one_sample_per_clip(tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS)
    fill(store)
    export(store.path, tmp_path / "tars", "webdataset")
    with tarfile.open(tmp_path / "tars" / "00000.tar") as tar:
        names = tar.getnames()
        assert json.load(tar.extractfile("00000003.json")) == {"clip_id": IDS[3]}  # type: ignore[arg-type]
    # A reader takes what has the same name up to the first dot, in a row, for one sample.
    assert [name.split(".", 1)[0] for name in names] == [f"{n:08d}" for n in range(len(IDS)) for _ in range(5)]
    assert {name.split(".", 1)[1] for name in names} >= {"json", "patches.npy", "cls.npy"}


@pytest.mark.parametrize("folder", [".", "train.v1"])
def test_a_tar_of_a_folder_is_imported_as_a_webdataset(folder: str, tmp_path: Path) -> None:
    files = write(tmp_path / folder, names=("a", "b")) if folder != "." else write(tmp_path / "dots", names=("a", "b"))
    (files / ".hidden.npy").touch()
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        tar.add(files, folder)  # as `tar cf 0.tar FOLDER` does, with the folder itself
    store = import_features(tmp_path / "tars", tmp_path / "store")
    assert store.clip_ids == (("a", "b") if folder == "." else ("train.v1/a", "train.v1/b"))


def test_converting_the_current_folder_writes_the_copy_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_features(write(tmp_path / "files"), tmp_path / "store")
    monkeypatch.chdir(tmp_path / "store")
    assert main(["convert", ".", "--dtype", "float32"]) == 0
    assert open_store(tmp_path / "store_float32").clip_ids == NAMES


def test_one_hdf5_file_with_a_dataset_per_clip_is_imported(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "all.h5", "w") as file:
        for number, name in enumerate(NAMES[1:]):  # a slash would make a group
            file[name] = np.full((2, 4, 8), number, np.float32)
    store = import_features(tmp_path / "all.h5", tmp_path / "store")
    assert store.read(NAMES[1:]).patches[:, 0, 0, 0].tolist() == list(range(len(NAMES) - 1))


def test_float8_tensors_and_parameters_are_imported(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    patches = torch.linspace(-2, 2, 64).view(2, 4, 8).to(torch.float8_e4m3fn)
    torch.save(patches, tmp_path / "files" / "a.pt")
    torch.save(torch.nn.Parameter(patches.float()), tmp_path / "files" / "b.pt")
    read = import_features(tmp_path / "files", tmp_path / "store").read(("a", "b")).patches
    assert torch.equal(read[0].float(), patches.float())
    assert torch.equal(*read)


def test_import_reads_each_clip_exactly_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads, ticks = feature_files._read_file, list[str](), list[tuple[int, int]]()
    monkeypatch.setattr(feature_files, "_read_file", lambda file: reads.append(file.name) or read(file))  # type: ignore[func-returns-value]
    import_features(write(tmp_path / "files"), tmp_path / "store", on_clips=lambda *done: ticks.append(done))
    assert len(reads) == 2 * len(NAMES)
    assert ticks == [(number, 2 * len(NAMES)) for number in range(1, 2 * len(NAMES) + 1)]


def test_import_and_export_commands_report_clips_and_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path / "files")
    assert main(["import", str(files), "--to", str(tmp_path / "store"), "--shard", "4"]) == 0
    assert "6 clips" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "store"), "--to", "pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(tmp_path / "store_pt"), "clips": 6}
    assert len(list(find_clips(tmp_path / "store_pt"))) == 6
    assert main(["import", str(files), "--to", str(tmp_path / "store"), "--shard", "4"]) == 0  # again, all is done


def test_a_folder_name_may_end_like_a_feature_file(tmp_path: Path) -> None:
    store = import_features(write(tmp_path / "in", names=("day.pt/1", "b")), tmp_path / "store")
    assert store.clip_ids == ("b", "day.pt/1")


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    """A data set may be spread over disks. A folder is read once, by the path without a link if there is one."""
    files = write(tmp_path / "files", names=("day/1",))
    (files / "disk2").symlink_to(write(tmp_path / "elsewhere", names=("2",)))
    (files / "circle").symlink_to(files)
    assert import_features(files, tmp_path / "store").clip_ids == ("day/1", "disk2/2")


@pytest.mark.parametrize("kind", ["pt", "hdf5"])
def test_ctrl_c_while_a_file_is_made_is_not_taken_for_a_fault(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(io.BytesIO):
        writes = 0

        def write(self, content: Any) -> int:
            self.writes += 1
            if self.writes == 3:
                signal.raise_signal(signal.SIGINT)
            return super().write(content)

    monkeypatch.setattr(io, "BytesIO", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[kind](tmp_path, [("a", {"patches": torch.ones(200, 300)})])
