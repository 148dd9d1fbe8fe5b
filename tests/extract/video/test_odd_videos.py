"""Videos that break a rule which nearly all others keep: the frames of a full decode, or a reason."""

from pathlib import Path

import av
import numpy as np
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video.container import VideoFile, open_video
from egopatch.extract.video.frames import read_frames
from egopatch.extract.video.indexing.cache import VideoCache
from egopatch.extract.video.indexing.index import VideoError, checksum
from tests.extract.video.odd_videos import ODD, full_decode, moving, without_ts_packet
from tests.extract.video.videos import B_FRAMES, write_video


def assert_shown(
    clip: Clip, frames: int, times_s: np.ndarray, shown: list[np.ndarray], cache: VideoCache | None = None
) -> None:
    """Each frame of `clip` is the one that a full decode shows at its time."""
    decoded = read_frames(clip, VideoConfig(frames=frames), cache)
    rows = np.abs(times_s[None] - decoded.times_s[:, None]).argmin(1)
    np.testing.assert_allclose(decoded.times_s, times_s[rows], atol=2e-3)
    for row, frame in zip(rows.tolist(), decoded.frames, strict=True):
        assert np.array_equal(frame, shown[row]), f"frame {row}"


@pytest.mark.parametrize("name", ODD)
def test_unusual_video_matches_a_full_decode(name: str, tmp_path: Path) -> None:
    odd = ODD[name]
    path = odd.make(tmp_path)
    times_s, shown = full_decode(path)
    if odd.times_s is not None:
        times_s = np.array(odd.times_s)
    cache = VideoCache()
    assert_shown(Clip("all", path), len(shown), times_s, shown, cache)
    span_s = float(times_s[-1])
    for start in (0.0, 0.3, 0.6):
        for frames in (1, 4):
            part = Clip("part", path, start * span_s, (start + 0.4) * span_s + 0.001)
            assert_shown(part, frames, times_s, shown, cache)


def test_a_lost_packet_costs_only_the_frames_that_depend_on_it(tmp_path: Path) -> None:
    path = without_ts_packet(write_video(tmp_path / "a.ts", options=B_FRAMES, draw=moving), 0.5)
    times_s, shown = full_decode(path)
    assert_shown(Clip("before", path, 0.0, 0.7), 4, times_s, shown)
    assert_shown(Clip("after", path, 1.6, 9.0), 4, times_s, shown)
    with pytest.raises(VideoError, match=r"cannot be decoded at \d\.\d+ s: .* damaged"):
        read_frames(Clip("at", path, 0.5, 1.6), VideoConfig(frames=16))


@pytest.mark.parametrize("by_decoding", [False, True], ids=["packets", "frames"])
def test_a_hole_in_a_damaged_file_is_not_filled_with_the_frame_before_it(by_decoding: bool, tmp_path: Path) -> None:
    """The reader finds the next packets after the damage and reports it, but VP9's decoder never notices."""
    path = write_video(tmp_path / "a.mkv", 90, codec="libvpx-vp9", options={"g": "30"}, draw=moving)
    times_s, shown = full_decode(path)
    content = bytearray(path.read_bytes())
    start, size = len(content) * 3 // 10, len(content) // 20
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    with open_video(path) as file:
        index = file.decode_through() if by_decoding else file.index
        lost = np.diff(index.starts_s).argmax()
        assert index.starts_s[lost + 1] - index.starts_s[lost] > 0.3
        assert np.flatnonzero(index.damaged).tolist() == [lost]  # the reader goes on at a key frame
        before, after = index.starts_s[[lost, lost + 1]].tolist()
    assert_shown(Clip("before", path, 0.0, before), 4, times_s, shown)
    assert_shown(Clip("after", path, after, 5.9), 4, times_s, shown)
    read_frames(Clip("to the end", path, after), VideoConfig(frames=4))  # the file is not truncated
    with pytest.raises(VideoError, match=r"cannot be decoded at \d\.\d+ s: the file is damaged from"):
        read_frames(Clip("in", path, before + 0.1, after - 0.1), VideoConfig(frames=4))


@pytest.mark.parametrize(
    ("pix_fmt", "line"),
    [("gray", 98), ("bgr24", 294), ("yuyv422", 196), ("yuv420p10le", 196), ("gray10le", 196), ("monow", 13)],
)
def test_checksum_covers_whole_lines_without_padding(pix_fmt: str, line: int) -> None:
    def filled(column: int | None) -> av.VideoFrame:
        frame = av.VideoFrame(98, 64, pix_fmt)
        content = np.zeros((64, frame.planes[0].line_size), np.uint8)
        if column is not None:
            content[5, column] = 1
        frame.planes[0].update(content.tobytes())
        return frame

    assert checksum(filled(line - 1)) != checksum(filled(None))
    assert filled(None).planes[0].line_size > line
    assert checksum(filled(line)) == checksum(filled(None))


def test_wrong_key_frame_flags_make_decoding_start_earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every packet is marked, decoding starts 1, 3, 7 packets earlier until there is a true key frame."""
    path = ODD["every packet marked, mpeg4"].make(tmp_path)
    keys: list[int] = []
    decode_from = VideoFile._decode_from
    monkeypatch.setattr(
        VideoFile, "_decode_from", lambda file, key, *rest: keys.append(key) or decode_from(file, key, *rest)
    )
    with open_video(path) as file:
        file.pixels(np.array([24, 28]))
    assert keys == [24, 23, 21, 17]  # the true key frames are 0, 10 and 20
