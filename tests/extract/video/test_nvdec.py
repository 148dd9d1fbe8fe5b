"""Decoding on a GPU: the pixels of PyAV, or a refusal that names the cause.

With FAIL_WITHOUT_CUDA=1 the tests marked `cuda` fail, instead of skipping, where there is none.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from egopatch.configs.schema import ConfigError, VideoConfig
from egopatch.extract.__main__ import main
from egopatch.extract.datasets import Clip
from egopatch.extract.video import container, nvdec
from egopatch.extract.video.container import open_video
from egopatch.extract.video.frames import VideoError, read_frames
from egopatch.extract.worker.job import resolve_job
from tests.extract.job import config_of, options
from tests.extract.video.odd_videos import ODD, coded, moving
from tests.extract.video.test_needed import CODED, x265
from tests.extract.video.videos import show_turned, write_video

# The unit refuses pictures smaller than some 144 pixels.
SIZE = (256, 192)
FILES = {
    "h264": lambda to: write_video(to / "a.mp4", size=SIZE, draw=moving, options={"bf": "3", "g": "12"}),
    "h264, full range": lambda to: write_video(to / "a.mp4", size=SIZE, draw=moving, pix_fmt="yuvj420p"),
    "h264, turned": lambda to: show_turned(write_video(to / "a.mp4", size=SIZE, draw=moving), (0, 1, -1, 0)),
    "hevc": lambda to: write_video(to / "a.mp4", size=SIZE, draw=moving, codec="libx265", options=x265()),
    "vp9": lambda to: write_video(to / "a.webm", size=SIZE, draw=moving, codec="libvpx-vp9", options={}),
}
# Their standards leave the rounding of the inverse transform open.
INEXACT = ("mpeg", "mjpeg", "exif", "packed b-frames", "wmv", "flv", "realvideo")


def has_gpu() -> bool:
    try:
        nvdec.require_gpu_decoder()
    except ConfigError:
        return False
    return True


@pytest.fixture(scope="session")
def gpu() -> None:
    if not has_gpu():
        if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail("FAIL_WITHOUT_CUDA=1 and no GPU decodes")
        pytest.skip("needs a GPU that decodes")


@pytest.mark.cuda
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_of_pyav(name: str, tmp_path: Path) -> None:
    path = FILES[name](tmp_path)
    for start_s, end_s, frames in ((None, None, 4), (None, None, 30), (0.3, 1.1, 3), (1.2, 1.4, 1)):
        clip = Clip("a", path, start_s, end_s)
        got, expected = (read_frames(clip, VideoConfig(frames=frames, decoder=one)) for one in ("nvdec", "pyav"))
        np.testing.assert_array_equal(got.times_s, expected.times_s)
        for one, other in zip(got.frames, expected.frames, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.cuda
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", {**ODD, **CODED})
def test_no_file_gives_other_pixels(name: str, tmp_path: Path) -> None:
    exact = not any(codec in name for codec in INEXACT)
    assert_pixels_or_refusal({**ODD, **CODED}[name].make(tmp_path), exact)


def assert_pixels_or_refusal(path: Path, exact: bool = True) -> None:
    clip = Clip("a", path)
    try:
        got = read_frames(clip, VideoConfig(frames=4, decoder="nvdec"))
    except VideoError as error:
        refusal = str(error)
    else:
        expected = read_frames(clip, VideoConfig(frames=4))
        for one, other in zip(got.frames, expected.frames, strict=True):
            assert np.abs(one.astype(int) - other).mean() <= (0 if exact else 2)
        return
    assert refusal.startswith(f"video {path} cannot be decoded by nvdec: ")


@pytest.mark.cuda
@pytest.mark.usefixtures("gpu")
def test_a_format_that_the_gpu_does_not_decode_is_named(tmp_path: Path) -> None:
    path = coded("mp4", "libx264", "yuv422p10le")(tmp_path)
    with pytest.raises(VideoError, match=r"nvdec: the GPU does not decode h264 High 4:2:2"):
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="nvdec"))


def test_without_a_driver_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU that decodes")
    path = write_video(tmp_path / "a.mp4")
    assert main(["frames", str(path), "--video.decoder", "nvdec", "--out", str(tmp_path / "a.npz")]) == 2
    error = capsys.readouterr().err
    assert "video.decoder is nvdec, but FFmpeg cannot use an NVIDIA GPU here (" in error
    assert "take pyav" in error


@pytest.fixture
def unused_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where FFmpeg has a GPU, but no decoder that uses it: it opens the video with one on the CPU."""
    monkeypatch.setattr(container, "accelerator", lambda: None)


@pytest.mark.usefixtures("unused_gpu")
@pytest.mark.parametrize("name", {**ODD, **CODED})
def test_the_way_of_a_file_is_that_of_pyav(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a GPU's frames pass but the GPU, with a decoder on the CPU in its place."""
    monkeypatch.setattr(container, "uses_gpu", lambda stream: True)
    assert_pixels_or_refusal({**ODD, **CODED}[name].make(tmp_path))


@pytest.mark.usefixtures("unused_gpu")
def test_the_cpu_never_decodes_instead(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=r"by nvdec: FFmpeg has no decoder for h264 that uses it; take video\.decoder"):
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="nvdec"))


@pytest.mark.usefixtures("unused_gpu")
def test_packets_that_are_not_frames_are_refused(tmp_path: Path) -> None:
    path = ODD["field pairs"].make(tmp_path)
    with open_video(path, on_gpu=True) as file:
        file.decode_through()
        with pytest.raises(VideoError, match="its packets are not one frame each"):
            file.pixels(np.array([0]))


def test_it_is_part_of_the_fingerprint(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egopatch.extract.worker.job.require_gpu_decoder", lambda: None)
    plain, other = (resolve_job(config_of(made, "--video.decoder", one)).fingerprint for one in ("decord", "nvdec"))
    assert plain == resolve_job(config_of(made)).fingerprint
    assert plain != other


def test_several_workers_do_not_share_a_gpu_decoder(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *options(made, "--video.decoder", "nvdec", "--engine.workers", "2")]) == 2
    assert "with 2 workers, whose children would all decode on the first GPU" in capsys.readouterr().err
