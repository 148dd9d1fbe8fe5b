"""Workers on one machine share a folder, in which their decoders find what others have found out about a video."""

import fcntl
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed import shared_folder
from egopatch.extract.feed.pool import DecodePool
from egopatch.extract.feed.shared_folder import SharedFolder
from tests.extract.feed.children import count_looks
from tests.features.faults import fork

VIDEO = VideoConfig()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_workers_share_the_folder_until_the_last_one_ends(folder: Path) -> None:
    first, second = SharedFolder(VIDEO), SharedFolder(VIDEO)
    assert first.path == second.path
    assert first.path.stat().st_mode & 0o777 == 0o700
    first.remove()
    assert second.path.is_dir()
    second.remove()
    assert list(folder.iterdir()) == []


def test_children_of_two_workers_inspect_a_video_only_once(folder: Path) -> None:
    clips = [Clip(name, folder / "video", start_s=0.0) for name in "ab"]
    with DecodePool(VIDEO, 1, count_looks) as one, DecodePool(VIDEO, 1, count_looks) as other:
        assert [*one.map(clips), *other.map(clips)] == [1] * 4
    assert (folder / "video").read_bytes() == b"."


def test_workers_with_different_limits_use_different_folders() -> None:
    first, second = SharedFolder(VIDEO), SharedFolder(replace(VIDEO, memory_gb=VIDEO.memory_gb + 1))
    assert first.path != second.path
    first.remove()
    second.remove()


def test_files_left_by_killed_workers_are_not_used(folder: Path) -> None:
    def killed() -> None:
        (SharedFolder(VIDEO).path / "index").touch()
        os._exit(9)

    fork(killed).wait()
    (left,) = folder.iterdir()
    assert list(left.iterdir())
    other = SharedFolder(replace(VIDEO, memory_gb=VIDEO.memory_gb + 1))
    assert list(folder.iterdir()) == [other.path]
    fork(killed).wait()
    again = SharedFolder(VIDEO)
    assert again.path == left
    assert list(again.path.iterdir()) == []
    other.remove()
    again.remove()


def test_a_folder_that_others_may_write_to_is_not_trusted(folder: Path) -> None:
    first = SharedFolder(VIDEO)
    first.path.chmod(0o777)
    second = SharedFolder(VIDEO)
    assert second.path != first.path
    assert second.path.stat().st_mode & 0o777 == 0o700
    first.remove()
    assert list(folder.iterdir()) == [second.path]
    second.remove()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_cleanup_keeps_a_folder_that_is_not_locked_yet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    (folder / "other").mkdir()
    sweeping, lock = [], fcntl.flock
    if not shared:
        monkeypatch.setattr(shared_folder, "_TRIES", 0)

    def locks(handle: int, how: int) -> None:
        if how & fcntl.LOCK_SH and not sweeping:
            sweeping.append(handle)
            shared_folder._remove_abandoned()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", locks)
    one = SharedFolder(VIDEO)
    assert sweeping
    assert sorted(folder.iterdir()) == sorted([folder / "other", one.path])
    one.remove()
    assert list(folder.iterdir()) == [folder / "other"]


def test_cleanup_keeps_a_folder_recreated_in_the_meantime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, replaced = SharedFolder(VIDEO), list[SharedFolder]()
    flock = fcntl.flock

    def meanwhile(handle: int, how: int) -> None:
        if not replaced:
            monkeypatch.undo()
            monkeypatch.setattr(tempfile, "tempdir", str(folder))
            first.remove()
            replaced.append(SharedFolder(VIDEO))
        flock(handle, how)

    monkeypatch.setattr(shared_folder.fcntl, "flock", meanwhile)
    shared_folder._remove_abandoned()
    assert replaced[0].path.is_dir()
    replaced[0].remove()
