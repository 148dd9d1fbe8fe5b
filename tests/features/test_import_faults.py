"""Unusable input files and unwritable destinations each give a one-line error."""

import errno
import os
import resource
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from egopatch.features import Fingerprint, Store, StoreError, create_store, open_store
from egopatch.features.__main__ import main
from egopatch.features.tools import feature_files
from egopatch.features.tools.export import export
from egopatch.features.tools.feature_files import WRITERS, write_lmdb
from egopatch.features.tools.importing import import_features
from tests.features.conftest import FINGERPRINT, SPEC, fill
from tests.features.faults import limited
from tests.features.test_import_export import NAMES, write


def test_an_lmdb_with_non_utf8_keys_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = _empty_lmdb(tmp_path)
    with feature_files._lmdb().open(str(place)) as env, env.begin(write=True) as transaction:
        transaction.put(b"\xff", b"")
    assert "lmdb cannot be read ('utf-8' codec can't decode" in _refusal("import", place, tmp_path / "store", capsys)


def test_a_clip_id_too_long_for_lmdb_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"lmdb cannot store clip '{'a' * 600}' .*; use another --to"):
        write_lmdb(tmp_path, [("a" * 600, {"patches": torch.ones(1, 1, 1)})])


Spoil = Callable[[Path], None]


def _save(path: Path, value: object) -> None:
    path.unlink()
    np.save(path, value, allow_pickle=True)  # type: ignore[arg-type]


def _hdf5(path: Path) -> None:
    path.unlink()
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file.create_dataset("patches", (2, 4, 8), "f4", chunks=True)


def _damaged_hdf5(path: Path) -> None:
    _hdf5(path)
    file = path.with_suffix(".h5")
    file.write_bytes(file.read_bytes().replace(b"TREE", b"BUSH"))


def _pickle(path: Path) -> None:
    path.unlink()
    torch.save({"patches": Path("x")}, path.with_suffix(".pt"))


def _torch(path: Path, tensor: torch.Tensor) -> None:
    path.unlink()
    torch.save(tensor, path.with_suffix(".pt"))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (
            lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "it is a pointer of Git LFS, ",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "not an array of numbers"),
        (lambda path: _save(path, np.array([{"lazy": 1}], dtype=object)), "not an array of numbers .*allow_pickle"),
        (lambda path: _save(path, np.array(["text"])), "has dtype <U4; expected numbers"),
        (
            lambda path: _save(path, np.zeros((0, 4, 8), np.float32)),
            "have shape .0, 4, 8.; expected at least one value",
        ),
        (lambda path: _save(path, np.full((2, 4, 8), np.nan)), "hold NaN or infinity"),
        (lambda path: _save(path, np.full((2, 4, 8), 1e6)), "exceed the range of float16; use another --dtype"),
        (
            lambda path: _save(path, np.ones((3, 4, 8))),
            "patches has shape .3, 4, 8.; expected .2, 4, 8. as in most clips",
        ),
        (lambda path: _save(path, np.ones((1, 2, 3, 4, 5))), r"expected \[T, N, D\]"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"), }", b"), (")), "not an array of numbers"),
        (_hdf5, "dataset 'patches' was created but never written"),
        (_damaged_hdf5, "a damaged HDF5 file .*wrong B-tree signature"),
        (_pickle, "not a file of plain tensors"),
        (lambda path: _torch(path, torch.ones(2, 4, 8).to_sparse()), "patches is a sparse, .* expected a dense one"),
        (lambda path: _torch(path, torch.ones(2, 4, 8, device="meta")), "empty tensor; expected a dense one"),
        (lambda path: _torch(path, torch.ones(2, 4, 8) * 1j), "patches has dtype complex64; expected real numbers"),
    ],
)
def test_an_unusable_file_is_named_and_nothing_is_imported(
    spoil: Spoil, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path / "files")
    spoil(files / f"{NAMES[2]}.npy")
    with pytest.raises(StoreError, match=why):
        import_features(files, tmp_path / "store")
    assert main(["import", str(files), "--to", str(tmp_path / "store")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"features import: failed: {files}: '{NAMES[2]}': ")
    assert said.endswith(": nothing was imported\n")
    assert said.count("\n") == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("kind", ["npy", "pt", "hdf5", "webdataset", "lmdb"])
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda file, others: shutil.copy(others / file.name, file), "it has other values"),
        (lambda file, others: file.unlink(), ".+"),
        (lambda file, others: file.write_bytes(b"not what the name says, and not short"), ".+"),
    ],
)
def test_a_clip_that_changes_during_an_import_is_named(
    kind: str, spoil: Callable[[Path, Path], object], why: str, tmp_path: Path
) -> None:
    for number, place in enumerate((tmp_path / "files", tmp_path / "others")):
        place.mkdir()
        WRITERS[kind](place, [("the clip", {"patches": torch.full((1, 1, 4), 1.0 + number)})])

    def spoil_after_the_check(done: int, total: int) -> None:
        if done == 1:
            (file,) = (path for path in (tmp_path / "files").iterdir() if path.name != "lock.mdb")
            spoil(file, tmp_path / "others")

    message = rf"files: 'the clip' has changed since it was checked \({why}\), so the store .*store is incomplete; "
    with pytest.raises(StoreError, match=message):
        import_features(tmp_path / "files", tmp_path / "store", on_clips=spoil_after_the_check)
    assert open_store(tmp_path / "store").clip_ids == ()


@pytest.mark.parametrize("name", ["all.h5", "0.tar", "data.mdb"])
@pytest.mark.parametrize("command", ["import", "compare"])
def test_a_damaged_file_of_many_clips_is_named(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / name).write_text("not what the name says")
    place = folder / name if name == "all.h5" else folder
    said = _refusal(command, place, tmp_path / "store", capsys)
    assert said.startswith(
        f"features {command}: failed: {folder if name == 'data.mdb' else folder / name} cannot be read ("
    )
    assert said.endswith("); copy or export it again\n")


def test_a_file_name_that_is_not_utf8_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path / "files")
    (files / f"{NAMES[1]}.npy").rename(files / os.fsdecode(b"\xff.npy"))
    assert "is not valid Unicode; expected text that UTF-8" in _refusal("import", files, tmp_path / "store", capsys)


@pytest.mark.parametrize("command", ["import", "compare"])
def test_a_truncated_lmdb_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = _empty_lmdb(tmp_path)
    write_lmdb(place, [(name, {"patches": torch.ones(1, 4, 4096)}) for name in NAMES])
    content = (place / "data.mdb").read_bytes()
    (place / "data.mdb").write_bytes(content[: len(content) // 2])
    said = _refusal(command, place, tmp_path / "store", capsys)
    assert said.startswith(f"features {command}: failed: {place} cannot be read (reading it ends in SIG")
    assert said.endswith(": it is truncated or damaged); copy or export it again\n")


def test_an_lmdb_with_a_damaged_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = _empty_lmdb(tmp_path)
    write_lmdb(place, [("the clip", {"patches": torch.ones(1, 1, 1)})])
    content = (place / "data.mdb").read_bytes()
    (place / "data.mdb").write_bytes(content.replace(b"\x08\0the clip", b"\0\0the clip"))  # its length
    said = _refusal("import", place, tmp_path / "store", capsys)
    assert said.startswith(f"features import: failed: {place} cannot be read (lmdb.BadValsizeError: ")


def _refusal(command: str, place: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one-line error with which `features import` or `features compare` refuses a path."""
    other = ["--to", str(store)] if command == "import" else [str(place)]
    assert main([command, str(place), *other]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def _empty_file(root: Path) -> Path:
    h5py.File(root / "all.h5", "w").close()
    return root / "all.h5"


def _empty_tar(root: Path) -> Path:
    (root / "tars").mkdir()
    tarfile.open(root / "tars" / "0.tar", "w").close()
    return root / "tars"


def _empty_lmdb(root: Path) -> Path:
    (root / "lmdb").mkdir()
    write_lmdb(root / "lmdb", [])
    return root / "lmdb"


@pytest.mark.parametrize("make", [_empty_file, _empty_tar, _empty_lmdb])
@pytest.mark.parametrize("command", ["import", "compare"])
def test_a_file_without_clips_is_named(
    command: str, make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make(tmp_path)
    said = _refusal(command, place, tmp_path / "store", capsys)
    assert said.startswith(f"features {command}: failed: {place} holds no clip; expected one ")
    assert said.endswith(": export the features again\n")


def test_an_export_into_the_store_is_refused(tmp_path: Path) -> None:
    store = import_features(write(tmp_path / "files"), tmp_path / "store")
    with pytest.raises(StoreError, match=r"--out is '.*/store/npy', inside the store '.*/store'; expected one"):
        export(store.path, tmp_path / "store" / "npy", "npy")


@pytest.mark.parametrize("name", ["all.h5", "a.tar", "data.mdb"])
def test_a_git_lfs_pointer_is_refused_with_the_pull_command(name: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    source = files / name if name == "all.h5" else files
    with pytest.raises(
        StoreError, match="is a pointer of Git LFS, not the file itself; run `git lfs pull` to fetch it"
    ):
        import_features(source, tmp_path / "store")


def test_a_link_to_a_missing_file_is_named(tmp_path: Path) -> None:
    """As git-annex leaves it; its clip would otherwise be missing from the store without a word."""
    files = write(tmp_path / "files")
    (files / "lost.npy").symlink_to(tmp_path / "annex" / "lost.npy")
    with pytest.raises(StoreError, match=r"'lost': it is a link to .*/annex/lost\.npy, which does not exist; fetch"):
        import_features(files, tmp_path / "store")


def test_faults_beyond_the_first_ten_are_only_counted(tmp_path: Path) -> None:
    files = write(tmp_path / "files", names=tuple(f"c{n:02d}" for n in range(30)))
    for number in range(14):
        (files / f"c{number:02d}.npy").write_bytes(b"")
    with pytest.raises(StoreError, match="'c09': the file is empty; and 4 more: nothing was imported"):
        import_features(files, tmp_path / "store")


@pytest.mark.parametrize(
    ("args", "code", "why"),
    [
        (
            ["import", "{files}", "--to", "{root}/store", "--grid", "3x3"],
            1,
            "has 4 patches a frame; --grid 3x3 expects 9",
        ),
        (
            ["import", "{root}/none", "--to", "{root}/store"],
            2,
            "which does not exist; expected a folder or an HDF5 file of features",
        ),
        (
            ["export", "{root}/files", "--to", "npy", "--out", "{root}/files"],
            1,
            "which exists; expected the name of a new folder",
        ),
        (["export", "{root}/none", "--to", "npy"], 2, "expected the folder of a store"),
        (["info", "a" * 5000], 1, "File name too long"),
        (["import", "{files}", "--to", "{files}/store"], 1, "/files'; expected one outside it"),
        (["import", "s3://bucket/files", "--to", "{root}/store"], 2, "expected a folder or an HDF5 file on this"),
    ],
)
def test_import_and_export_usage_errors_print_one_line(
    args: list[str], code: int, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path / "files")
    assert main([arg.format(files=files, root=tmp_path) for arg in args]) == code
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("folder", ["a" * 5000, ""])
def test_an_invalid_sources_folder_prints_one_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(tmp_path), "--sources", folder])
    said = capsys.readouterr().err
    assert "is not a folder; expected the folder of the videos, data.root" in said
    assert said.count("\n") == 1


def test_an_interrupted_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = import_features(write(tmp_path / "files"), tmp_path / "store")
    read = Store.read_arrays

    def dies(self: Store, ids: list[str], *args: object, **options: object) -> object:
        if NAMES[4] in ids:
            raise KeyboardInterrupt
        return read(self, ids, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "read_arrays", dies)
    (tmp_path / "out.part").mkdir()  # the user's
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export(store.path, tmp_path / "out", "npy")
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    assert export(store.path, tmp_path / "out", "npy") == 6
    assert len(list((tmp_path / "out").iterdir())) == 6
    assert Fingerprint(dict(open_store(store.path).fingerprint.fields)) == store.fingerprint


@pytest.mark.parametrize("kind", WRITERS)
def test_an_export_onto_a_full_disk_prints_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = import_features(write(tmp_path / "files"), tmp_path / "store")
    monkeypatch.setattr(feature_files, "free_bytes", lambda path: 0)
    with limited(resource.RLIMIT_FSIZE, 100):
        assert main(["export", str(store.path), "--to", kind, "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"features export: failed: no space left while exporting to {tmp_path / 'out'} (")
    assert line.endswith("); nothing is kept: free some space and run the same command again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "store"]


def test_an_export_into_a_folder_that_cannot_be_written_names_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the hidden folder beside it, which becomes `--out` once it is complete."""
    store, out = import_features(write(tmp_path / "files"), tmp_path / "store"), tmp_path / "out"
    make = Path.mkdir

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.parent == tmp_path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["export", str(store.path), "--to", "npy", "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith(
        f"features export: failed: {out} cannot be written (Read-only file system"
    )


@pytest.mark.parametrize("kind", ["npy", "pt", "hdf5"])
@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (("a//b",), "the file name 'a//b.* would not give back its clip's id"),
        (("a/",), "the file name 'a/..* would not give back its clip's id"),
        (("a" * 256,), r"a file cannot have the name 'a.*' \(File name too long\)"),
        (("a.npy/b", "a.pt/b", "a.h5/b", "a"), "the ids of two clips give the same file 'a"),
        (("a", "a.npy/b", "a.pt/b", "a.h5/b"), r"a file cannot have the name 'a.*/b.*' \("),
    ],
)
def test_ids_that_cannot_be_file_names_are_refused(kind: str, ids: tuple[str, ...], why: str, tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, ids)
    fill(store)
    with pytest.raises(StoreError, match=why):
        export(store.path, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()
    assert export(store.path, tmp_path / "out", "webdataset") == len(ids)
