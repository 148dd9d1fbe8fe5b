"""Decoding on a GPU: the pixels of PyAV, or a refusal that names the cause.

With FAIL_WITHOUT_CUDA=1 the tests marked `cuda` fail, instead of skipping, where there is none.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.codec.hwaccel import HWAccel

from egopatch.configs.schema import ConfigError, VideoConfig
from egopatch.extract.__main__ import main
from egopatch.extract.datasets import Clip
from egopatch.extract.video import container, nvdec, opening
from egopatch.extract.video.container import open_video
from egopatch.extract.video.frames import VideoError, read_frames, read_planes
from egopatch.extract.video.orientation import Upright
from egopatch.extract.video.planes import Planes
from egopatch.extract.worker.job import resolve_job
from tests.extract.job import config_of, options
from tests.extract.video.odd_videos import ODD, REFUSED, coded, full_decode, moving
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
# FFmpeg's names of codecs whose standards leave the rounding of the inverse transform open.
INEXACT = {"mpeg1video", "mpeg2video", "mpeg4", "mjpeg"}


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
def test_nvdec_and_pyav_pixels_are_equal(name: str, tmp_path: Path) -> None:
    path = FILES[name](tmp_path)
    for start_s, end_s, frames in ((None, None, 4), (None, None, 30), (0.3, 1.1, 3), (1.2, 1.4, 1)):
        clip = Clip("a", path, start_s, end_s)
        got, expected = (read_frames(clip, VideoConfig(frames=frames, decoder=one)) for one in ("nvdec", "pyav"))
        np.testing.assert_array_equal(got.times_s, expected.times_s)
        for one, other in zip(got.frames, expected.frames, strict=True):
            assert np.array_equal(one, other)
        for one, other in zip(converted(clip, frames), expected.frames, strict=True):
            assert np.array_equal(one, other)


def converted(clip: Clip, frames: int) -> list[np.ndarray]:
    """The pixels of frames that a device encodes, whose colours it converts itself where it can."""
    left = read_planes(clip, VideoConfig(frames=frames, decoder="nvdec")).frames
    return [frame.rgb() if isinstance(frame, Planes) else frame for frame in left]


@pytest.mark.cuda
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", {**ODD, **CODED})
def test_unusual_file_matches_pyav_or_is_refused(name: str, tmp_path: Path) -> None:
    path = {**ODD, **CODED}[name].make(tmp_path)
    assert_pixels_or_refusal(path, codec_of(path) not in INEXACT)


def codec_of(path: Path) -> str:
    """FFmpeg's name of the codec of the film, which may stand behind a preview."""
    with opening.opened(path) as file:
        return max(file.streams.video, key=lambda stream: stream.frames).codec_context.name


def assert_pixels_or_refusal(path: Path, exact: bool = True) -> None:
    clip = Clip("a", path)
    try:
        got = read_frames(clip, VideoConfig(frames=4, decoder="nvdec"))
    except VideoError as error:
        refusal = str(error)
    else:
        expected = read_frames(clip, VideoConfig(frames=4))
        for found in (got.frames, converted(clip, 4)):
            for one, other in zip(found, expected.frames, strict=True):
                assert np.abs(one.astype(int) - other).mean() <= (0 if exact else 2)
        return
    assert refusal.startswith(f"video {path} cannot be decoded by nvdec: ")


@pytest.mark.cuda
@pytest.mark.usefixtures("gpu")
def test_a_format_that_the_gpu_does_not_decode_is_named(tmp_path: Path) -> None:
    path = coded("mp4", "libx264", "yuv422p10le")(tmp_path)
    with pytest.raises(VideoError, match=r"nvdec: the GPU does not decode h264 High 4:2:2"):
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="nvdec"))


def test_missing_gpu_driver_is_reported_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU that decodes")
    path = write_video(tmp_path / "a.mp4")
    assert main(["frames", str(path), "--video.decoder", "nvdec", "--out", str(tmp_path / "a.npz")]) == 2
    error = capsys.readouterr().err
    assert "video.decoder is nvdec, but FFmpeg cannot use an NVIDIA GPU here (" in error
    assert "use pyav" in error


@pytest.mark.parametrize(("name", "codec"), [("gif", "gif"), ("ffv1", "ffv1"), ("av1", "libdav1d")])
def test_a_codec_without_a_decoder_on_the_gpu_is_named(name: str, codec: str, tmp_path: Path) -> None:
    """PyAV refuses to open such a file for a GPU, whether there is one or not."""
    path = ODD[name].make(tmp_path)
    with pytest.raises(VideoError, match=rf"{path.name} cannot be .* by nvdec: FFmpeg has no {codec} decoder that"):
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="nvdec"))


@pytest.mark.parametrize("name", ["unknown codec", "text", "audio in mp4"])
def test_file_that_no_decoder_reads_gets_the_same_error_as_with_pyav(name: str, tmp_path: Path) -> None:
    make, expected = REFUSED[name]
    path = make(tmp_path)
    with pytest.raises(VideoError, match=expected) as refused:
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="nvdec"))
    assert "nvdec" not in str(refused.value)


def test_a_gpu_that_fails_while_a_file_is_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another process had taken the GPU's memory, simulated with a GPU index that does not exist."""
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(opening, "accelerator", lambda: HWAccel("cuda", "99", allow_software_fallback=False))
    with pytest.raises(VideoError, match=r"by nvdec: the GPU cannot be used \(.+\); use video\.decoder pyav for it"):
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="nvdec"))


@pytest.fixture
def unused_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if FFmpeg had a GPU but no decoder that uses it: it opens the video with a CPU decoder."""
    monkeypatch.setattr(opening, "accelerator", lambda: None)


@pytest.mark.usefixtures("unused_gpu")
@pytest.mark.parametrize("name", {**ODD, **CODED})
def test_gpu_code_path_on_the_cpu_matches_pyav_or_refuses_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code path of frames from a GPU, with a CPU decoder in its place."""
    monkeypatch.setattr(container, "uses_gpu", lambda stream: True)
    assert_pixels_or_refusal({**ODD, **CODED}[name].make(tmp_path))


@pytest.mark.usefixtures("unused_gpu")
def test_decoding_never_falls_back_to_the_cpu(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=r"by nvdec: FFmpeg has no h264 decoder that uses the GPU; use video\.decoder"):
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="nvdec"))


@pytest.mark.usefixtures("unused_gpu")
def test_packets_that_are_not_frames_are_refused(tmp_path: Path) -> None:
    path = ODD["field pairs"].make(tmp_path)
    with open_video(path, on_gpu=True) as file:
        file.decode_through()
        with pytest.raises(VideoError, match="its packets do not hold one frame each"):
            file.pixels(np.array([0]))


@pytest.mark.usefixtures("unused_gpu")
@pytest.mark.parametrize("kind", [av.error.InvalidDataError, av.error.MemoryError, av.error.ExternalError])
def test_every_gpu_error_names_nvdec(
    kind: type[av.FFmpegError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Including lack of memory, which may be the GPU's, so that a larger `video.memory_gb` would not help."""

    def fail(self: Upright, frame: av.VideoFrame) -> np.ndarray:
        raise kind(1, "no frame")

    monkeypatch.setattr(container, "uses_gpu", lambda stream: True)
    monkeypatch.setattr(Upright, "__call__", fail)
    path = write_video(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=r"by nvdec: no frame; use video\.decoder pyav for it"):
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="nvdec"))


@pytest.mark.usefixtures("unused_gpu")
def test_a_frame_that_only_the_gpu_finds_damaged_names_nvdec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "uses_gpu", lambda stream: True)
    decode = container.decode
    monkeypatch.setattr(container, "decode", lambda packet: None if packet.pts == 4096 else decode(packet))
    path = write_video(tmp_path / "a.mp4", options={"bf": "0"})
    with pytest.raises(VideoError, match=r"by nvdec: the frame at \d.* is damaged or has a wrong time.*; use video"):
        read_frames(Clip("a", path), VideoConfig(frames=4, decoder="nvdec"))


class GpuFrame:
    """A frame as PyAV shows it while it lies in a GPU's memory: no filter takes it."""

    def __init__(self, frame: av.VideoFrame, kept_as: str | None) -> None:
        self.format = SimpleNamespace(name="cuda")
        self.sw_format = None if kept_as is None else SimpleNamespace(name=kept_as)
        self._frame = frame

    @property
    def side_data(self) -> object:
        return self._frame.side_data

    @property
    def rotation(self) -> int:
        return self._frame.rotation

    def reformat(self, format: str, threads: int) -> av.VideoFrame:
        """A copy in the computer's memory; PyAV copies the side data too."""
        assert (format, threads) == ("yuv420p", 1)
        return self._frame


@pytest.fixture
def exif(tmp_path: Path) -> Path:
    return ODD["exif"].make(tmp_path)


@pytest.fixture
def first(exif: Path) -> Iterator[av.VideoFrame]:
    with av.open(str(exif)) as file:
        yield next(file.decode(video=0))


def test_side_data_without_a_name_is_read_from_the_copy(exif: Path, first: av.VideoFrame) -> None:
    """PyAV 18 cannot name it, and raises ValueError."""
    assert np.array_equal(Upright(exif)(GpuFrame(first, "nv12")), full_decode(exif)[1][0])


@pytest.mark.parametrize(("kept_as", "named"), [("p016le", "p016le"), (None, "an unknown format")])
def test_unexpected_gpu_frame_format_is_named(
    kept_as: str | None, named: str, exif: Path, first: av.VideoFrame
) -> None:
    with pytest.raises(
        VideoError, match=f"avi cannot .* by nvdec: the GPU returns its frames as {named}; expected nv12"
    ):
        Upright(exif)(GpuFrame(first, kept_as))


def test_nvdec_is_part_of_the_fingerprint(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egopatch.extract.worker.job.require_gpu_decoder", lambda: None)
    plain, other = (resolve_job(config_of(made, "--video.decoder", one)).fingerprint for one in ("decord", "nvdec"))
    assert plain == resolve_job(config_of(made)).fingerprint
    assert plain != other


def test_several_workers_do_not_share_a_gpu_decoder(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *options(made, "--video.decoder", "nvdec", "--engine.workers", "2")]) == 2
    assert "with 2 workers, which would all decode on the first GPU" in capsys.readouterr().err


@pytest.mark.parametrize("error", [NotImplementedError("no CUDA"), av.error.ExternalError(1, "no GPU")])
def test_no_context_is_held_where_there_is_no_gpu(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the video says so; `require_gpu_decoder` says it before a job begins."""

    def create(_: object) -> None:
        raise error

    monkeypatch.setattr(nvdec, "_settings", lambda primary: SimpleNamespace(create=create))
    assert nvdec._held_context.__wrapped__() is None
    with pytest.raises(ConfigError, match=r"FFmpeg cannot use an NVIDIA GPU here .*use pyav"):
        nvdec.require_gpu_decoder()
