"""Children share what they find out about a video; reading a long file does not use up a clip's timeout."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.children.limits import SLOWEST_BYTES_PER_S, clock_stopped, limits, reading_through
from egopatch.extract.video.indexing import cache
from egopatch.extract.video.indexing.cache import FileVersion, VideoCache
from egopatch.extract.video.indexing.index import VideoError
from tests.features.faults import fork

VERSION = Path("a.mp4"), 1000, 1


def never() -> int:
    raise AssertionError("it is known")


def find(folder: Path | None, value: int, version: FileVersion = VERSION, what: str = "index") -> int:
    """As a new process would."""
    return VideoCache(folder).find(what, version, lambda: value)


def test_a_process_remembers_the_latest_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "IN_MEMORY", 2)
    known = VideoCache()
    versions = {name: (Path(name), 1, 1) for name in "abc"}
    computed = []
    for name in "abacab":
        known.find("index", versions[name], lambda name=name: computed.append(name))  # type: ignore[misc]
    assert computed == ["a", "b", "c", "b"]


def test_concurrent_lookups_wait_for_the_first_to_compute(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def compute() -> int:
        begun.set()
        assert go_on.wait(30)
        return 5

    with ThreadPoolExecutor() as threads:
        first = threads.submit(VideoCache(tmp_path).find, "index", VERSION, compute)
        assert begun.wait(30)
        others = [threads.submit(VideoCache(tmp_path).find, "index", VERSION, never) for _ in range(3)]
        go_on.set()
        assert [first.result(30), *(other.result(30) for other in others)] == [5] * 4


def test_other_file_version_or_kind_of_value_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(tmp_path, 1) == 1
    assert find(tmp_path, 2) == 1
    assert find(tmp_path, 3, (Path("a.mp4"), 1000, 2)) == 3
    assert find(tmp_path, 4, (Path("b.mp4"), 1000, 1)) == 4
    monkeypatch.chdir(tmp_path)
    assert find(tmp_path, 6) == 6  # a.mp4 of another folder
    assert find(tmp_path, 5, what="sha256") == 5


def test_error_is_not_cached_as_a_value(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        VideoCache(tmp_path).find("index", VERSION, never)
    assert find(tmp_path, 2) == 2


def test_truncated_cache_file_is_recomputed(tmp_path: Path) -> None:
    assert find(tmp_path, 1) == 1
    (file,) = tmp_path.iterdir()
    for length in range(file.stat().st_size):
        file.write_bytes(file.read_bytes()[:length])
        assert find(tmp_path, length) == length


def test_missing_cache_folder_is_not_an_error(tmp_path: Path) -> None:
    assert find(tmp_path / "gone", 1) == 1


def test_old_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "IN_FILES", 3)
    monkeypatch.setattr(cache, "CLEAN_EVERY", 1)
    for number in range(10):
        assert find(tmp_path, number, (Path("a.mp4"), number, 1)) == number
    assert len(list(tmp_path.iterdir())) == 3
    assert find(tmp_path, 0, (Path("a.mp4"), 9, 1)) == 9


def test_timeout_is_extended_while_reading_through_or_waiting() -> None:
    def left() -> float:
        return signal.getitimer(signal.ITIMER_REAL)[0]

    with limits(VideoConfig(timeout_s=1000, memory_gb=1000)):
        assert 900 < left() <= 1000
        with reading_through(int(500 * SLOWEST_BYTES_PER_S)):
            assert 1400 < left() <= 1500
        assert 900 < left() <= 1000
        with clock_stopped():
            assert left() == 0
        assert 900 < left() <= 1000
    with reading_through(1), clock_stopped():
        assert left() == 0


def test_a_video_that_cannot_be_indexed_is_read_through_once(tmp_path: Path) -> None:
    read: list[int] = []

    def compute() -> int:
        read.append(1)
        raise VideoError("video a.mp4 has no frame")

    same = VideoCache(tmp_path)
    for known in (same, same, VideoCache(tmp_path)):
        with pytest.raises(VideoError, match=r"video a\.mp4 has no frame"):
            known.find("index", VERSION, compute)
    assert len(read) == 1
    assert find(tmp_path, 7, (Path("a.mp4"), 1000, 2)) == 7  # the file was replaced


def test_transient_error_is_not_remembered(tmp_path: Path) -> None:
    def lost() -> int:
        raise OSError(5, "Input/output error")

    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error"):
            VideoCache(tmp_path).find("index", VERSION, lost)
    assert find(tmp_path, 7) == 7


def test_video_that_kills_its_decoder_is_tried_only_twice(tmp_path: Path) -> None:
    def die() -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    def attempt() -> None:
        VideoCache(tmp_path).find("index", VERSION, die)

    for _ in range(2):
        assert fork(attempt).wait() == -signal.SIGKILL
    with pytest.raises(
        VideoError, match=r"a\.mp4 cannot be read through \(index\): 2 decoders were killed while they read it"
    ):
        find(tmp_path, 7)


def test_single_killed_decoder_does_not_reject_the_video(tmp_path: Path) -> None:
    assert fork(lambda: find_and_die(tmp_path)).wait() == -signal.SIGKILL
    assert find(tmp_path, 7) == 7
    assert find(tmp_path, 8) == 7


def test_child_killed_with_its_worker_does_not_reject_the_video(tmp_path: Path) -> None:
    def worker() -> None:
        fork(lambda: find_and_die(tmp_path)).wait()

    for _ in range(3):
        assert fork(worker).wait() == 0
    assert find(tmp_path, 7) == 7


def test_lookup_does_not_wait_forever_for_a_stopped_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE_S", 0.0)

    def compute() -> int:
        assert find(tmp_path, 6, (Path("a.mp4"), 0, 1)) == 6
        return 5

    assert VideoCache(tmp_path).find("index", (Path("a.mp4"), 0, 1), compute) == 5
    assert find(tmp_path, 7, (Path("a.mp4"), 0, 1)) == 5


def find_and_die(folder: Path) -> None:
    VideoCache(folder).find("index", VERSION, lambda: os.kill(os.getpid(), signal.SIGKILL))
