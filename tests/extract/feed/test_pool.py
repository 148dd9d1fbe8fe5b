import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.children import spawned
from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.children.spawned import SpawnedPool
from egopatch.extract.datasets import Clip
from egopatch.extract.feed import clips as feed_clips
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.pool import NICENESS, DecodePool, UndecodedClip, slots_for
from egopatch.extract.video.container import VideoError
from egopatch.extract.video.indexing.cache import VideoCache
from tests.extract.feed import acting
from tests.extract.feed.children import cut_clip
from tests.extract.feed.prepared import prepare_clip
from tests.extract.job import wait_until
from tests.extract.video.videos import write_video

SMALL = VideoConfig(frames=2, size=32)


KILLED = {
    acting.hang: r"took over 3 s to decode \(video\.timeout_s\); its decoder was killed$",
    acting.hang_outside_of_python: r"took over 3 s to decode \(video\.timeout_s\); its decoder was killed$",
    acting.allocate: r"took over 1 GB of memory to decode \(video\.memory_gb\)",
    acting.die: "the decoder of video .*a.mp4 died with exit code 3$",
}
FAILED = {
    acting.leave: "a.mp4 cannot be decoded: SystemExit: 4$",
    acting.fail_to_read: "a.mp4 cannot be decoded: OSError: .*Input/output error",
    acting.fail_in_torch: "a.mp4 cannot be decoded: RuntimeError: stack expects each tensor to be equal size$",
    acting.fail_with_two_arguments: "a.mp4 cannot be decoded: TwoArguments: this and that$",
    acting.fail_unpicklably: "a.mp4 cannot be decoded: Unpicklable: own text$",
}


@pytest.fixture
def clips(tmp_path: Path) -> list[Clip]:
    video = write_video(tmp_path / "a.mp4")
    return [Clip(name, video) for name in "abc"]


def test_clips_keep_their_order_and_match_in_process_decoding(clips: list[Clip]) -> None:
    with DecodePool(SMALL, 2, prepare_clip) as pool:
        results = list(pool.map(clips * 3))
    assert [one.clip for one in results] == clips * 3
    expected = prepare_clip(clips[0], SMALL, VideoCache())
    for one in results:
        assert isinstance(one, PreparedClip)
        # Children resize on one thread, this process on several: the last bit may differ.
        np.testing.assert_allclose(one.frames, expected.frames, rtol=0, atol=1e-6)
        assert (one.source, one.timestamps.tolist()) == (expected.source, expected.timestamps.tolist())


@pytest.mark.slow
def test_quick_clips_share_tasks_and_a_dead_child_fails_only_its_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    schedule = SpawnedPool.schedule

    def count(self: SpawnedPool, function: Callable, *args: Any) -> object:
        sizes.append(len(args[1]))
        return schedule(self, function, *args)

    monkeypatch.setattr(SpawnedPool, "schedule", count)
    names = [str(i) for i in range(100)]
    names[80] = names[95] = "die"
    with DecodePool(SMALL, 2, acting.name_or_die, SharedSlots(slots_for(4, 2), 1 << 12, "names", "")) as pool:
        results = list(pool.map((Clip(name, Path("a.mp4")) for name in names), ahead=4, together=4))
        assert len(pool._slots._free) == slots_for(4, 2)
    for name, result in zip(names, results, strict=True):
        if name == "die":
            assert isinstance(result, UndecodedClip)
            assert result.reason == "the decoder of video a.mp4 died with exit code 3"
        else:
            assert result == name
    assert sizes[0] == 1, "nothing is known yet about the first clips"
    assert max(sizes) == 4
    assert len(sizes) < 70


@pytest.mark.slow
def test_timeout_applies_to_each_clip_of_a_task() -> None:
    names = ["0"] * 60 + ["1"] * 8  # the last ones come four at a time, since the first ones were quick
    with DecodePool(replace(SMALL, timeout_s=2.5), 2, acting.sleep_or_name) as pool:
        assert list(pool.map([Clip(name, Path("a.mp4")) for name in names], together=4)) == names


@pytest.mark.slow
def test_memory_limit_holds_after_a_clip_exhausts_file_descriptors() -> None:
    names = ["a", "files", "memory", "b"]
    with DecodePool(replace(SMALL, memory_gb=0.3), 1, acting.use_up) as pool:
        results = list(pool.map([Clip(name, Path("a.mp4")) for name in names]))
    assert isinstance(results[2], UndecodedClip)
    assert "took over 0.3 GB of memory" in results[2].reason
    assert [results[0], results[1], results[3]] == ["a", "files", "b"]


@pytest.mark.parametrize("reasons", [FAILED, pytest.param(KILLED, marks=pytest.mark.slow)], ids=["fails", "is killed"])
def test_failing_or_killed_child_fails_only_its_clip(reasons: dict[Callable[[], None], str], tmp_path: Path) -> None:
    """And the recorded reason is that of its own clip."""
    path = write_video(tmp_path / "a.mp4")
    clips = [Clip(name, path) for action in reasons for name in (action.__name__, "good")]
    video = VideoConfig(frames=2, size=32, timeout_s=3, memory_gb=1)
    with DecodePool(video, 2, acting.act, SharedSlots(len(clips), 1 << 20, "frames", "")) as pool:
        results = list(pool.map(clips))
    assert [result.clip for result in results] == clips
    for good in results[1::2]:
        assert isinstance(good, PreparedClip)
    for bad, reason in zip(results[::2], reasons.values(), strict=True):
        assert isinstance(bad, UndecodedClip)
        assert re.search(reason, bad.reason), bad.reason
        assert "\n" not in bad.reason
        assert bad.traceback.startswith("Traceback") or reasons is KILLED  # a killed child has none to give
        if "video.timeout_s" in bad.reason:
            assert bad.seconds == video.timeout_s
        elif reasons is FAILED:
            assert bad.seconds > 0


@pytest.mark.slow
def test_a_clip_that_ran_out_of_time_while_the_job_was_suspended_is_tried_again(tmp_path: Path) -> None:
    """After Ctrl-Z and `fg`, or a scheduler's suspension; the child's alarm runs on meanwhile."""
    video = write_video(tmp_path / "a.mp4")
    program = (sys.executable, "-m", "tests.extract.feed.children", "be_suspended", str(video))
    job = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_until((tmp_path / "begun").exists)
        os.killpg(job.pid, signal.SIGSTOP)
        time.sleep(5)
        os.killpg(job.pid, signal.SIGCONT)
        out, _ = job.communicate(timeout=90)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    assert out.splitlines() == ["decoded", "decoded"]


def test_a_clip_whose_decoder_the_system_killed_is_tried_again(tmp_path: Path) -> None:
    with DecodePool(SMALL, 1, acting.be_killed_at_first) as pool:
        assert list(pool.map([Clip("a", tmp_path / "killed")])) == ["a"]


def test_a_full_disk_does_not_quarantine_clips() -> None:
    """Later clips, which may take hours to decode, would have no room either, so the error ends the job."""
    with (
        DecodePool(VideoConfig(), 1, prepare=acting.find_the_disk_full) as pool,
        pytest.raises(OSError, match=r"No space left on device: 'a\.mp4'"),
    ):
        next(pool.map([Clip("a", Path("a.mp4"))]))


def test_an_interrupt_while_children_start_stops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    start = spawned._Process.start
    started: list[spawned._Process] = []

    def interrupted(process: spawned._Process) -> None:
        start(process)
        if len(started) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        started.append(process)

    before = multiprocessing.active_children()
    monkeypatch.setattr(spawned._Process, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DecodePool(SMALL, 2, prepare_clip)
    assert set(multiprocessing.active_children()) <= set(before)


def test_starting_children_exit_silently_with_the_pool(capfd: pytest.CaptureFixture[str]) -> None:
    """As when a worker finds no shard left on a busy machine: its children are still starting when the pool ends."""
    before = multiprocessing.active_children()
    for wait_s in (0, 0.1, 0.3):
        with DecodePool(SMALL, 1, prepare_clip):
            time.sleep(wait_s)
    assert set(multiprocessing.active_children()) <= set(before)
    assert capfd.readouterr().err == ""


def test_decoders_run_at_lower_priority_than_the_encoder() -> None:
    with DecodePool(SMALL, 1, acting.niceness) as pool:
        assert list(pool.map([Clip("a", Path("none"))])) == [("a", min(os.nice(0) + NICENESS, 19))]


def test_failure_to_start_children_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(spawned._Process, "start", refuse)
    with pytest.raises(ChildProcessError, match=r"cannot be started.*; check the machine's free memory and its limit"):
        DecodePool(SMALL, 2, prepare_clip)


def test_unreadable_file_is_returned_with_reason_and_traceback(tmp_path: Path) -> None:
    with DecodePool(SMALL, 1, cut_clip) as pool:
        (result,) = pool.map([Clip("x", tmp_path / "none.mp4")])
    assert isinstance(result, UndecodedClip)
    assert "does not exist" in result.reason
    assert "VideoError" in result.traceback


def test_file_removed_or_changed_while_read_fails_its_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip("a", write_video(tmp_path / "a.mp4"))
    read = feed_clips.read_frames

    def then(change: Callable[[Path], object]) -> None:
        def reading(*args: object) -> object:
            decoded = read(*args)  # type: ignore[arg-type]
            change(clip.video)
            return decoded

        monkeypatch.setattr(feed_clips, "read_frames", reading)

    then(lambda path: path.write_bytes(path.read_bytes() + b"0"))
    with pytest.raises(VideoError, match=r"a\.mp4 changed while it was being read"):
        prepare_clip(clip, SMALL, VideoCache())
    then(Path.unlink)
    with pytest.raises(FileNotFoundError, match=r"a\.mp4"):
        prepare_clip(clip, SMALL, VideoCache())
