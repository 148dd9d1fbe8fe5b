"""Frames pass from children to their parent through shared memory that is not leaked when a process dies."""

import errno
import gc
import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.children import slots
from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.datasets import Clip
from egopatch.extract.feed import decoders
from egopatch.extract.feed.clips import PreparedClip, SharedClip
from egopatch.extract.feed.decoders import open_decoders
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.feed.pixels import FrameKind, _runs
from egopatch.extract.feed.pool import TOGETHER, DecodePool, UndecodedClip
from egopatch.extract.feed.shared_folder import SharedFolder
from egopatch.extract.video.frames import DecodedClip, read_frames
from egopatch.extract.video.planes import even
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM
from tests.extract.feed.children import die_or_prepare
from tests.extract.video.test_planes import rgb_of
from tests.extract.video.videos import write_video
from tests.features.faults import limited

CHILDREN = (sys.executable, "-m", "tests.extract.feed.children")
SMALL = VideoConfig(frames=2, size=32)
KIND = FrameKind(SMALL.size, EGOVLP_TRANSFORM, planes=True)


def memories() -> int:
    """Number of shared memories for slots that this process still holds."""
    inodes = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the folder's own handle
            if str(path.readlink()).startswith("/memfd:egopatch"):
                inodes.add(path.stat().st_ino)
    return len(inodes)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def seen_of(frames: np.ndarray) -> np.ndarray:
    """The part of whole frames, [T, H, W, 3], that the transform looks at."""
    window = EGOVLP_TRANSFORM.looks_at(*frames.shape[1:3])
    return frames[:, window.rows, window.columns]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return write_video(tmp_path / "a.mp4")


def test_frames_from_children_match_those_of_this_process(video: Path, tmp_path: Path) -> None:
    other = write_video(tmp_path / "other.mp4", frames=12)
    expected = {path: seen_of(np.stack(read_frames(Clip("a", path), SMALL).frames)) for path in (video, other)}
    sources = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (video, other)}
    clips = [Clip(str(i), (video, other)[i % 3 % 2]) for i in range(80)]
    with open_decoders(SMALL, [replace(KIND, planes=False)], 1, 3) as pool:
        for clip, result in zip(clips, pool.map(clips, ahead=2, together=TOGETHER), strict=True):
            assert isinstance(result, PreparedClip)
            assert (result.clip, result.source) == (clip, sources[clip.video])
            assert [np.array_equal(run.frames, expected[clip.video]) for run in result.frames] == [True]
            result.release()


def test_cut_planes_match_the_decoded_frames(video: Path) -> None:
    decoded = read_frames(Clip("a", video), SMALL)
    with open_decoders(SMALL, [KIND], 1, 3) as pool:
        (result,) = pool.map([Clip("a", video)])
    assert isinstance(result, PreparedClip)
    (run,) = result.frames
    part = even(EGOVLP_TRANSFORM.looks_at(*run.cut.whole))
    assert run.cut.window == part
    expected = np.stack(decoded.frames)[:, part.rows, part.columns]
    assert np.array_equal(rgb_of(run), expected)
    assert run.frames.nbytes == expected.nbytes // 2


@pytest.mark.parametrize("planes", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_frames_too_large_for_a_slot_arrive_transformed(
    planes: bool, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "LARGEST", 64)
    with open_decoders(SMALL, [replace(KIND, planes=planes)], 1, 3) as pool:
        (result,) = pool.map([Clip("a", video)])
    assert isinstance(result, PreparedClip)
    expected = to_input(read_frames(Clip("a", video), SMALL).frames, 32)
    assert np.array_equal(result.frames, expected)


def test_frame_runs_of_several_sizes_fit_in_one_slot() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((5, 7), (5, 7), (9, 3), (5, 7))]
    times = np.zeros(4)
    runs = _runs(DecodedClip(tuple(frames), times.astype(np.float32), times), EGOVLP_TRANSFORM)
    memory = np.zeros(4096, np.uint8)
    clip = PreparedClip(Clip("a", Path("a")), runs, times.astype(np.float32), "", 1, 0.0)
    found = SharedClip.write(clip, memory).read(memory, lambda: None).frames
    assert [len(run.frames) for run in found] == [2, 1, 1]
    for mine, run in zip(runs, found, strict=True):
        assert np.array_equal(np.stack(mine.frames), run.frames)


def test_refused_shared_memory_error_names_the_option_to_lower() -> None:
    message = r"no room for 0.03 GB of frames .*File too large.*; lower engine.decoders"
    with limited(resource.RLIMIT_FSIZE, 1 << 20), pytest.raises(OSError, match=message):
        SharedSlots(4, 1 << 23, "frames", "engine.decoders")


@pytest.mark.slow
def test_slot_of_a_killed_child_is_released(video: Path) -> None:
    names = ["killed", "a", "killed", "killed", "b", "c"]
    with DecodePool(SMALL, 1, die_or_prepare, SharedSlots(3, 1 << 20, "frames", "")) as pool:
        for name, result in zip(names, pool.map([Clip(name, video) for name in names]), strict=True):
            if name == "killed":
                assert isinstance(result, UndecodedClip)
                assert "died with exit code -9" in result.reason
            else:
                assert isinstance(result, PreparedClip), result
                result.release()
        assert len(pool._slots._free) == 3


def test_closed_pool_leaves_no_files_or_memory_open(video: Path) -> None:
    gc.collect()
    files, before = open_files(), memories()
    for _ in range(2):
        with open_decoders(SMALL, [KIND], 1, 2) as pool:
            for result in pool.map([Clip("a", video)]):
                assert memories() == before + 1
                assert isinstance(result, PreparedClip)
                result.release()
        del result
        assert memories() == before
    assert open_files() <= files + 2  # what multiprocessing keeps for the next pool


def test_taking_more_slots_than_exist_raises_an_assertion_error() -> None:
    full = SharedSlots(1, 10, "frames", "")
    full.take()
    with pytest.raises(AssertionError, match="all 1 slots are in use; give one back first"):
        full.take()
    full.close()


def test_memory_beyond_the_limit_fails_in_one_line_and_leaks_nothing() -> None:
    files, message = open_files(), r"no room for 2199.02 GB of rows \(Cannot allocate memory\); lower store.shard, or"
    with limited(resource.RLIMIT_AS, 1 << 40), pytest.raises(OSError, match=message):
        SharedSlots(2, 1 << 40, "rows", "store.shard")
    gc.collect()
    assert open_files() == files


def test_temporary_file_is_used_where_memfd_is_unavailable(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: str) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(slots.os, "memfd_create", refuse)
    temporary = tmp_path / "tmp"  # other programs of this machine write to the usual one
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = memories()
    with open_decoders(SMALL, [KIND], 1, 2) as pool:
        assert memories() == before
        (result,) = pool.map([Clip("a", video)])
        assert isinstance(result, PreparedClip)
        (run,) = result.frames
        assert run.frames.any()
        assert not [path for path in temporary.iterdir() if path.is_file()]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"note: frames between decoders and encoder are kept in a file of up to 0.1 GB in {temporary}"
    )


def test_decoding_children_use_little_memory_and_start_fast(video: Path) -> None:
    """They import no torch; the job's own script, which a child imports too, must not either."""
    done = subprocess.run([*CHILDREN, "describe", str(video)], capture_output=True, text=True, check=True)
    seconds, memory, *heavy = done.stdout.split()
    assert not heavy
    assert float(seconds) < 1.5
    assert int(memory) < 150e6


@pytest.mark.slow
def test_decoding_a_thousand_clips_leaks_no_files_or_memory(video: Path) -> None:
    done = subprocess.run([*CHILDREN, "decode_many", str(video)], capture_output=True, text=True, check=True)
    files, memory = map(int, done.stdout.split())
    assert files <= 0
    assert memory < 8e6


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["the parent", "all of them"])
def test_killed_job_leaves_no_children_and_its_folder_can_be_removed(
    whole: bool, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All jobs on a machine share a folder, and the last one removes it: no other test's job may use this one.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    job = subprocess.Popen(
        [*CHILDREN, "wait_for_the_end", str(video)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert job.stdout is not None
    folder, *numbers = job.stdout.readline().split()
    children = [psutil.Process(int(number)) for number in numbers]
    assert len(children) >= 2
    assert Path(folder).parent == tmp_path
    assert Path(folder).is_dir()
    if whole:
        os.killpg(job.pid, signal.SIGKILL)
    else:
        job.kill()
    _, alive = psutil.wait_procs(children, timeout=30)  # with the last one the memory is gone: it has no name
    assert not alive
    job.wait()
    job.stdout.close()
    SharedFolder(SMALL).remove()  # what the next job does
    assert not Path(folder).exists()
