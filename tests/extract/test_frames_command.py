"""`extract frames` writes a clip's frames, or the reason for which the clip would be quarantined."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from egopatch.configs.schema import VideoConfig
from egopatch.extract.__main__ import main
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.video.frames import read_frames
from egopatch.extract.video.indexing.cache import VideoCache
from tests.extract.feed.prepared import prepare_clip
from tests.extract.video.odd_videos import FILES
from tests.extract.video.videos import FPS, frame_numbers, write_video
from tests.features.faults import limited


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", frames=30)


def test_frames_and_times_match_the_clip(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "frames.npz"
    stretch = ["--start", "0.5", "--end", "1.5", "--video.frames", "4"]
    assert main(["frames", str(video), *stretch, "--out", str(out)]) == 0
    assert "4 frames of 96x64 pixels, at 0.600, 0.800, 1.067, 1.333 s" in capsys.readouterr().out
    with np.load(out) as written:
        frames, times_s = written["frames"], written["times_s"]
    assert (frames.dtype, frames.shape, times_s.shape) == (np.uint8, (4, 64, 96, 3), (4,))
    assert times_s == pytest.approx(np.array(frame_numbers(frames)) / FPS)
    clip, config = Clip("c", video, 0.5, 1.5), VideoConfig(frames=4, size=64)
    assert np.array_equal(frames, read_frames(clip, config).frames)
    assert torch.equal(to_input(frames, 64), torch.from_numpy(prepare_clip(clip, config, VideoCache()).frames))


def test_output_folder_receives_one_png_per_frame(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["frames", str(video), "--video.frames", "2", "--out", str(tmp_path / "png"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["shapes"] == [[64, 96, 3]] * 2
    assert shown["times_s"] == pytest.approx([7 / FPS, 22 / FPS])
    paths = sorted((tmp_path / "png").iterdir())
    assert [path.name for path in paths] == ["000_0.467s.png", "001_1.467s.png"]
    assert frame_numbers(np.stack([np.asarray(Image.open(path)) for path in paths])) == [7, 22]


def test_output_folder_holds_the_frames_of_the_last_call_only(video: Path, tmp_path: Path) -> None:
    (tmp_path / "000_note.png").touch()
    for frames in ("4", "2"):
        assert main(["frames", str(video), "--video.frames", frames, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000_0.467s.png", "000_note.png", "001_1.467s.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        ([], 1, "a.mp4"),
        (["--start", "9"], 1, "correct the clip's times"),
        (["--start", "-1"], 2, "start_s is -1.0; expected seconds from the video's start, at least 0"),
        (["--video.frames", "0"], 2, "video.frames is 0; expected at least 1"),
    ],
)
def test_failure_is_reported_in_one_line(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, reason: str
) -> None:
    broken = tmp_path / "a.mp4"
    broken.write_bytes(video.read_bytes()[:500] if not arguments else video.read_bytes())
    command = ["frames", str(broken), *arguments, "--out", str(tmp_path / "out.npz")]
    if code == 1:
        assert main(command) == 1
    else:
        with pytest.raises(SystemExit, match="2"):
            main(command)
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


def test_missing_video_is_reported_without_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command reads none."""
    missing = tmp_path / "nope.mp4"
    assert main(["frames", str(missing), "--out", str(tmp_path / "out.npz")]) == 1
    fault = f"video {missing} does not exist; put the file there or correct its path"
    assert capsys.readouterr().err == f"extract frames: failed: {fault}\n"


@pytest.mark.parametrize(("out", "named"), [("w.npz", "w.npz"), ("png", "png/000_0.467s.png")])
def test_full_disk_keeps_existing_files(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, named: str
) -> None:
    file = tmp_path / named
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"old")
    with limited(resource.RLIMIT_FSIZE, 100):
        assert main(["frames", str(video), "--video.frames", "2", "--out", str(tmp_path / out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == f"extract frames: failed: {file}: File too large; free some space there and run the same command again"
    )
    assert [(path, path.read_bytes()) for path in file.parent.iterdir()] == [(file, b"old")]


def test_frames_of_several_sizes_go_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = FILES / "size_changes.mp4"
    assert main(["frames", str(video), "--video.frames", "4", "--out", str(tmp_path / "a.npz")]) == 1
    assert "several sizes, 256x128 and 128x128, which one array cannot hold; give --out a" in capsys.readouterr().err
    assert main(["frames", str(video), "--video.frames", "4", "--out", str(tmp_path / "png")]) == 0
    sizes = []
    for path in sorted((tmp_path / "png").iterdir()):
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes == [(256, 128), (256, 128), (128, 128), (128, 128)]
