"""Features as files of other programs: written from stores by `export`, read by `import` and `compare`.

A clip is a dict of arrays without the batch: `patches` [T, N, D], and any of `cls` [D], `saliency` [T, N] and
`timestamps` [T] that it has. The layouts, by `--to`:

    npy         FOLDER/ID.npy: only the patches
    pt          FOLDER/ID.pt: a dict of tensors, for torch.load
    hdf5        FOLDER/ID.h5: one dataset per array
    webdataset  FOLDER/00000.tar, ...: for each sample, ID as json and one npy per array
    lmdb        FOLDER: one key per clip; its value is a file as numpy.savez writes it
"""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from egopatch.features.common.disk import free_bytes
from egopatch.features.common.signals import signals_held
from egopatch.features.formats.hdf5_shards import open_unlocked
from egopatch.features.io.lfs import pointer_fault
from egopatch.features.io.walk import files_below, is_file_or_lost
from egopatch.features.values.errors import StoreError

Arrays = Mapping[str, Tensor]
Clip = tuple[str, Arrays]
# Reads a clip. A fault raises a ValueError that explains it.
ReadClip = Callable[[], dict[str, Tensor]]
# A clip that is still to be read: its id, and the function that reads it.
Unread = tuple[str, ReadClip]
TAR_CLIPS = 64  # in one file of a webdataset
LMDB_FILE = 2**14  # bytes of an empty one
LMDB_BYTES = 2**40  # of address space; the file grows with its content
_SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".h5", ".hdf5")


def _write_file(folder: Path, name: str, content: bytes | memoryview) -> None:
    """Write a whole file; a clip id with slashes makes folders.

    The libraries write into memory, not into the file: on a full disk NumPy raises an OSError without a cause, torch
    another error, and HDF5 ends the process.

    Raises:
        StoreError: An earlier clip has this file, as `A` and `a` share one on some disks; or the file would be read
            under another id, as those of `a//b` and `a/`; or the system does not accept its name.
    """
    file = folder / name
    if file.relative_to(folder).as_posix() != name or not file.suffix:
        raise StoreError(f"the file name {name!r} would not give back its clip's id; use --to webdataset")
    try:
        if file.exists():
            raise StoreError(f"the ids of two clips give the same file {name!r}; use --to webdataset")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR):
            raise
        raise StoreError(f"a file cannot have the name {name!r} ({error.strerror}); use --to webdataset") from error


def write_npy(folder: Path, clips: Iterable[Clip]) -> None:
    """One file per clip, with its patches."""
    for name, arrays in clips:
        _write_file(folder, f"{name}.npy", _npy(arrays["patches"]))


def write_pt(folder: Path, clips: Iterable[Clip]) -> None:
    """One file per clip, with all its tensors."""
    for name, arrays in clips:
        content = io.BytesIO()
        with signals_held():  # torch and HDF5 make other errors of an interrupt within their calls of `content.write`
            torch.save({key: value.clone() for key, value in arrays.items()}, content)
        _write_file(folder, f"{name}.pt", content.getvalue())


def write_hdf5(folder: Path, clips: Iterable[Clip]) -> None:
    """One file per clip, with a dataset for each array."""
    for name, arrays in clips:
        content = io.BytesIO()
        with signals_held(), h5py.File(content, "w") as file:
            for key, value in arrays.items():
                file.create_dataset(key, data=as_numpy(value))
        _write_file(folder, f"{name}.h5", content.getvalue())


def write_webdataset(folder: Path, clips: Iterable[Clip]) -> None:
    """Tar files of up to 64 clips. A sample's key is its number, because keys may hold no dots; `json` has its id."""
    numbered = enumerate(clips)
    for shard in range(2**31):
        samples = list(islice(numbered, TAR_CLIPS))
        if not samples:
            return
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, (name, arrays) in samples:
                _add(tar, f"{number:08d}.json", json.dumps({"clip_id": name}).encode())
                for key, value in arrays.items():
                    _add(tar, f"{number:08d}.{key}.npy", _npy(value))


def write_lmdb(folder: Path, clips: Iterable[Clip]) -> None:
    """One key per clip.

    Raises:
        StoreError: The package lmdb is not installed, or refuses a clip, such as one with an id of over 511 bytes.
        OSError: The disk is full.
    """
    lmdb = _lmdb()
    doing, size = "create its file", LMDB_FILE
    try:
        with lmdb.open(str(folder), map_size=LMDB_BYTES) as env:
            for name, arrays in clips:
                content = io.BytesIO()
                np.savez(content, **{key: as_numpy(value) for key, value in arrays.items()})  # type: ignore[arg-type]
                value = content.getvalue()
                doing, size = f"store clip {name!r}", len(value)
                with env.begin(write=True) as transaction:
                    transaction.put(name.encode(), value)
    except lmdb.Error as error:
        if free_bytes(folder) < size:  # lmdb itself calls a full disk an "Input/output error"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise StoreError(f"{folder}: lmdb cannot {doing} ({error}); use another --to") from error


WRITERS = {
    "npy": write_npy,
    "pt": write_pt,
    "hdf5": write_hdf5,
    "webdataset": write_webdataset,
    "lmdb": write_lmdb,
}


def find_clips(path: Path) -> list[Unread]:
    """The clips of a folder in one of the layouts above, or of an HDF5 file with one dataset or group a clip.

    Raises:
        StoreError: There is nothing of the kind at `path`, or a file of many clips is empty or damaged.
    """
    found = list(_find(path))
    if not found:
        expected = "one dataset or group per clip" if path.is_file() else _expected()
        raise StoreError(f"{path} holds no clip; expected {expected}: export the features again")
    return found


def _find(path: Path) -> Iterator[Unread]:
    if path.is_file() and path.suffix in (".h5", ".hdf5"):
        with _named_if_damaged(path), _open_hdf5(path) as file:
            names = list(file)
        yield from ((name, partial(_read_hdf5, path, name)) for name in names)
        return
    if not path.is_dir():
        raise StoreError(f"{path} is neither a folder nor an HDF5 file; expected features: {_expected()}")
    if (path / "data.mdb").exists():
        yield from _find_lmdb(path)
        return
    candidates = [file for file in files_below(path, hidden=True) if file.suffix in (*_SUFFIXES, ".tar")]
    files = sorted(file for file in candidates if is_file_or_lost(file))
    if not files:
        raise StoreError(f"{path} holds no features; expected {_expected()}")
    for file in files:
        if file.suffix == ".tar":
            yield from _find_tar(file)
        else:
            yield file.relative_to(path).with_suffix("").as_posix(), partial(_read_file, file)


def _expected() -> str:
    return f"one file per clip ({', '.join(_SUFFIXES)}), tar files of a webdataset, or an lmdb folder"


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.is_symlink() and not file.exists():
        raise ValueError(
            f"it is a link to {file.readlink()}, which does not exist; fetch that file, or remove the link"
        )
    if not file.stat().st_size:
        raise ValueError("the file is empty")
    if fault := pointer_fault(file):
        raise ValueError(f"it {fault}")
    if file.suffix in (".h5", ".hdf5"):
        return _read_hdf5(file, None)
    if file.suffix in (".pt", ".pth"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that it checks sparse tensors, which are refused anyway
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # parsers raise many types over damaged bytes, all with this meaning
            reason = _first_line(error)
            raise ValueError(f"not a file of plain tensors ({reason}); save a tensor or a dict of them") from None
        return _named(content)
    return _named(_load_numpy(file))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _load_numpy(file: Path | io.BytesIO) -> Any:
    try:
        loaded = np.load(file, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    except Exception as error:  # of many types, as for torch.load
        raise ValueError(f"not an array of numbers ({_first_line(error)})") from None


def _open_hdf5(path: Path) -> Any:
    try:
        return open_unlocked(path)
    except OSError as error:
        raise ValueError(f"not an HDF5 file ({_first_line(error)})") from None


def _read_hdf5(path: Path, name: str | None) -> dict[str, Tensor]:
    """The datasets of the file, or of its member `name`."""
    try:
        with _open_hdf5(path) as file:
            found = file if name is None else file[name]
            datasets = {"patches": found} if isinstance(found, h5py.Dataset) else dict(found)
            for key, dataset in datasets.items():
                if not isinstance(dataset, h5py.Dataset):
                    raise ValueError(f"{key!r} is a group; expected datasets")
                if dataset.size and not dataset.id.get_storage_size():
                    raise ValueError(f"dataset {key!r} was created but never written")
            return _named({key: dataset[()] for key, dataset in datasets.items()})
    except (OSError, RuntimeError, LookupError, TypeError) as error:  # h5py's, over damaged bytes
        raise ValueError(f"a damaged HDF5 file ({_first_line(error)})") from None


@contextmanager
def _named_if_damaged(path: Path) -> Iterator[None]:
    """Turn an error of a library that looks for the clips of a file into a StoreError that names the file."""
    try:
        if fault := pointer_fault(path / "data.mdb" if path.is_dir() else path):
            raise StoreError(f"{path} {fault}")
        yield
    except StoreError:
        raise
    except Exception as error:  # of h5py, tarfile, json or lmdb
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"{path} cannot be read ({reason:.120}); copy or export it again") from error


def _find_tar(path: Path) -> Iterator[Unread]:
    samples: dict[str, dict[str, str]] = {}
    with _named_if_damaged(path), tarfile.open(path) as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            folder, slash, file = member.name.removeprefix("./").rpartition("/")
            key, _, kind = file.partition(".")
            if key:  # else it is a hidden file
                samples.setdefault(f"{folder}{slash}{key}", {})[kind] = member.name
        names = {key: _tar_id(tar, key, members) for key, members in samples.items()}
    for key, members in samples.items():
        yield names[key], partial(_read_tar, path, members)


def _read_tar(path: Path, members: Mapping[str, str]) -> dict[str, Tensor]:
    """The arrays of a sample: those of its members `KEY.npy`, which is the patches, and `KEY.NAME.npy`."""
    with _named_if_damaged(path), tarfile.open(path) as tar:
        files = {kind: _get(tar, member) for kind, member in members.items() if kind.endswith("npy")}
    arrays = {}
    for kind, content in files.items():
        name = kind.removesuffix(".npy").removesuffix("npy") or "patches"
        arrays[name] = _load_numpy(io.BytesIO(content))
    return _named(arrays)


def _tar_id(tar: tarfile.TarFile, key: str, members: Mapping[str, str]) -> str:
    """The clip's id: from the sample's json, else its key."""
    return str(json.loads(_get(tar, members["json"])).get("clip_id", key)) if "json" in members else key


def _find_lmdb(path: Path) -> Iterator[Unread]:
    with _named_if_damaged(path):
        _require_sound_lmdb(path)
        with _open_lmdb(path) as env, env.begin() as transaction:
            keys = {key.decode(): key for key in transaction.cursor().iternext(values=False)}
    for name, key in keys.items():
        yield name, partial(_read_lmdb, path, key)


def _open_lmdb(path: Path) -> Any:
    return _lmdb().open(str(path), readonly=True, lock=False)


def _read_lmdb(path: Path, key: bytes) -> dict[str, Tensor]:
    with _named_if_damaged(path), _open_lmdb(path) as env, env.begin() as transaction:
        content = transaction.get(key)
    return _named(_load_numpy(io.BytesIO(content)))


# Reads as `_read_lmdb` does, in a process of its own.
_READ_LMDB = """
import sys, lmdb
with lmdb.open(sys.argv[1], readonly=True, lock=False) as env, env.begin() as transaction:
    for key in transaction.cursor().iternext(values=False):
        transaction.get(key)
"""


def _require_sound_lmdb(path: Path) -> None:
    """Check that every clip can be read; lmdb maps its file into memory, so damage may kill a process that reads it.

    Raises:
        StoreError: The package lmdb is not installed.
        ValueError: The file is damaged.
    """
    _lmdb()
    child = subprocess.run(
        [sys.executable, "-c", _READ_LMDB, path], stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if child.returncode < 0:
        raise ValueError(f"reading it ends in {signal.Signals(-child.returncode).name}: it is truncated or damaged")
    if child.returncode:
        raise ValueError("".join(child.stderr.strip().splitlines()[-1:]))


def _named(content: Any) -> dict[str, Tensor]:
    """Arrays by name; the array called `features`, or the only array, becomes the patches."""
    arrays = content if isinstance(content, Mapping) else {"patches": content}
    tensors = {}
    for key, value in arrays.items():
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "fiub":
                raise ValueError(f"{key} has dtype {value.dtype}; expected numbers")
            value = torch.from_numpy(np.ascontiguousarray(value))
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} is a {type(value).__name__}; expected tensors or arrays")
        tensors[str(key)] = _plain(str(key), value)
    if "patches" not in tensors and ("features" in tensors or len(tensors) == 1):
        name = "features" if "features" in tensors else next(iter(tensors))
        tensors["patches"] = tensors.pop(name)
    if "patches" not in tensors:
        raise ValueError(f"holds {', '.join(tensors) or 'nothing'}; expected an array called patches or features")
    return tensors


def _plain(name: str, tensor: Tensor) -> Tensor:
    """The tensor, in a dtype that torch computes with: 8-bit floats as float32, which holds the same values."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"{name} is a sparse, nested, quantised or empty tensor; expected a dense one")
    if tensor.is_complex():
        raise ValueError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; expected real numbers")
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def as_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor as an array; bfloat16, which NumPy does not have, as float32, which holds the same values."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def _npy(tensor: Tensor) -> bytes:
    content = io.BytesIO()
    np.save(content, as_numpy(tensor))
    return content.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _get(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.extractfile(name)
    assert member is not None
    return member.read()


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError:
        raise StoreError("the package lmdb is not installed; run: pip install 'egopatch[lmdb]'") from None
    return lmdb
