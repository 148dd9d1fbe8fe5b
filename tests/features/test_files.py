"""Checksums are the standard ones, and a replaced file is the old one or the new one."""

import errno
import fcntl
import os
import signal
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from egopatch.features import Store, StoreError, create_store, open_store
from egopatch.features.io.files import (
    SummedFile,
    crc32c,
    locked,
    rename_into_place,
    replacing,
    size_and_crc,
    size_and_crc_of_file,
    write_file,
)
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import verify
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip, fill
from tests.features.faults import fork


@pytest.mark.parametrize("size", [0, 1, 9, 2**20 - 1, 2**20, 2**21 + 7])
def test_file_size_and_crc32_match_zlib(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert size_and_crc_of_file(tmp_path / "file") == size_and_crc(content) == (size, zlib.crc32(content))
    with SummedFile(tmp_path / "parts") as file:
        file.write(np.frombuffer(content[: size // 3], np.uint8), zlib.crc32(content[: size // 3]))
        file.write(content[size // 3 :])
        file.write(b"")
    assert file.sum == size_and_crc_of_file(tmp_path / "parts") == (size, zlib.crc32(content))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system does not take the advice")
def test_the_disk_begins_to_write_a_file_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def advise(handle: int, offset: int, size: int, advice: int) -> None:
        assert os.fstat(handle).st_size >= offset + size  # the bytes have left the file's buffer
        begun.append((offset, size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with SummedFile(tmp_path / "rows") as file:
        for size in (5 << 20, 100, 5 << 20, 1, 9 << 20, 1 << 20):
            file.write(bytes(size))
    assert begun == [(0, (10 << 20) + 100), ((10 << 20) + 100, (9 << 20) + 1)]


def test_crc32c_matches_the_standard_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


def test_replacing_keeps_the_old_file_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as new:
            new.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_write_errors_name_the_file_rather_than_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def fail(kind: type[OSError], with_name: bool) -> None:
        with replacing(path) as new:
            raise kind(errno.ENOSPC, os.strerror(errno.ENOSPC), *([str(new)] if with_name else []))

    for kind, with_name in ((OSError, True), (OSError, False), (av.error.OSError, True)):
        with pytest.raises(OSError, match="No space left") as caught:
            fail(kind, with_name)
        assert caught.value.filename == str(path)


def test_a_read_only_file_system_is_an_error_of_the_file_and_not_of_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses to remove a file even if there is none."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        write_file(tmp_path / "file", b"x")
    assert caught.value.filename == str(tmp_path / "file")


def test_an_error_of_renaming_names_the_place_of_the_file(tmp_path: Path) -> None:
    """The file itself lies in a temporary folder, which is removed before the user can look at it."""
    (tmp_path / "staged").write_bytes(b"x")
    (tmp_path / "place").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        rename_into_place(tmp_path / "staged", tmp_path / "place")
    assert raised.value.filename == str(tmp_path / "place")


@pytest.mark.parametrize(
    ("synced", "named"), [("staging/*/cls", "staging/.*/cls"), ("zarr.json.tmp", "zarr.json"), ("cls", "cls")]
)
def test_an_error_of_syncing_names_the_file_and_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: str, named: str
) -> None:
    sync, place = os.fsync, tmp_path / "store"

    def fail(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}")
        if any(path.samefile(file) for file in place.glob(synced)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"Input/output error: '{place}/{named}'$"):
        fill(create_store(place, SPEC, FINGERPRINT, IDS))


def test_concurrent_replacements_of_a_file_do_not_collide(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_reads_work_and_writes_explain_the_refusal(
    make_local: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = make_local()
    fill(store, skip=(IDS[0],))

    def no_locks(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    store = open_store(store.path)
    assert len(store.read([IDS[1]]).cls) == 1
    assert verify(store.path).ok
    with pytest.raises(StoreError) as caught:
        store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "sha256:0"})
    line = str(caught.value)
    assert line.startswith(f"{store.path}/leases/lock cannot be locked ({os.strerror(number)}): the ")
    assert " file system at /" in line
    assert line.endswith(
        "; mount it with locks (Lustre: option flock; NFS: version 4, or run lockd), or write to another file system"
    )


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_store_that_cannot_be_written_names_path_and_remedy(
    make_local: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store = make_local()
    open_file = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(number, os.strerror(number), str(path))
        return open_file(path, flags, mode)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(StoreError) as caught:
        store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "sha256:0"})
    assert str(caught.value) == (
        f"{store.path}/leases/lock cannot be written ({os.strerror(number)}) while taking the lease of shard 0 of "
        f"{store.path}; mount the file system for writing, or give this user permission, and run the same command again"
    )


def test_files_follow_the_umask(make_local: Callable[..., Store]) -> None:
    before = os.umask(0o002)
    try:
        store = make_local()
        fill(store)
        with locked(store.path / "a.lock"):
            pass
    finally:
        os.umask(before)
    modes = {path.relative_to(store.path): path.stat().st_mode & 0o777 for path in store.path.rglob("*")}
    assert {str(name): oct(mode) for name, mode in modes.items() if mode not in (0o664, 0o775)} == {}


def test_a_lock_is_released_even_if_a_forked_child_inherited_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with locked(path):
        child = fork(signal.pause)
    try:
        taken = threading.Event()

        def take() -> None:
            with locked(path):
                taken.set()

        threading.Thread(target=take, daemon=True).start()
        assert taken.wait(10)
    finally:
        child.kill()


@pytest.mark.parametrize(
    "name", ["store.json", "ledger.jsonl", "ids.jsonl", "ids.jsonl.head", "quarantine.jsonl", "metadata", "shard"]
)
def test_a_store_in_a_clone_without_git_lfs_is_not_damaged(store: Store, format: str, name: str) -> None:
    metadata, shard = ("index.h5", "shards/00000000.h5") if format == "hdf5" else ("zarr.json", "cls/c.0.0")
    file = store.path / {"metadata": metadata, "shard": shard}.get(name, name)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    ledger = (store.path / "ledger.jsonl").read_bytes()
    for action in (verify, repair):
        with pytest.raises(StoreError, match=f"^{file} is a pointer of Git LFS, .* run `git lfs pull`") as caught:
            action(store.path)
        assert type(caught.value) is StoreError
    assert (store.path / "ledger.jsonl").read_bytes() == ledger
