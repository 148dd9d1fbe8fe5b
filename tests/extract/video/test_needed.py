"""Only what the wanted frames need is decoded, and the pixels are those of a full decode."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video import container
from egopatch.extract.video.container import VideoFile, open_video
from egopatch.extract.video.frames import read_frames, uniform_indices
from tests.extract.video.odd_videos import coded, full_decode, kept, moving, one_by_one, rewrite
from tests.extract.video.videos import B_FRAMES, start_at, write_video


@dataclass(frozen=True)
class Coded:
    """A video of thirty frames.

    Attributes:
        make: Writes it into a folder.
        spared: Whether it has frames that nothing refers to and that the decoder is spared.
    """

    make: Callable[[Path], Path]
    spared: bool = True


def x265(**options: str) -> dict[str, str]:
    every = {"log-level": "none", "keyint": "12", "bframes": "3", **options}
    return {"x265-params": ":".join(f"{name}={value}" for name, value in every.items())}


def h264(to: Path, **options: str) -> Path:
    return write_video(to / "a.mp4", options={**B_FRAMES, **options}, draw=moving)


CODED = {
    "h264": Coded(h264),
    "h264 in mkv": Coded(lambda to: write_video(to / "a.mkv", options=B_FRAMES, draw=moving)),
    "h264, open groups": Coded(lambda to: h264(to, **{"x264-params": "open-gop=1"})),
    "h264, no b-frame refers to another": Coded(lambda to: h264(to, **{"x264-params": "b-pyramid=none:slices=3"})),
    "h264, edit list": Coded(lambda to: start_at(h264(to), 5)),
    "h264, no b-frames": Coded(lambda to: h264(to, bf="0"), spared=False),
    "h264, interlaced": Coded(lambda to: h264(to, **{"x264-params": "tff=1"}), spared=False),
    "h264, start codes": Coded(lambda to: write_video(to / "a.ts", options=B_FRAMES, draw=moving), spared=False),
    "hevc": Coded(coded("mp4", "libx265", **x265())),
    "hevc, open groups": Coded(coded("mp4", "libx265", **x265(**{"open-gop": "1"}))),
    "hevc, layers": Coded(coded("mp4", "libx265", **x265(**{"temporal-layers": "3"}))),
    "mpeg4": Coded(coded("mp4", "mpeg4", b="4000000", bf="2")),
    "vp9": Coded(coded("webm", "libvpx-vp9", **{"auto-alt-ref": "1", "lag-in-frames": "10"}), spared=False),
    "av1": Coded(coded("mp4", "libsvtav1"), spared=False),
}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each packet with a frame that the decoder is given."""
    sizes: list[int] = []
    decode = container.decode
    monkeypatch.setattr(container, "decode", lambda packet: sizes.append(packet.size) or decode(packet))
    return sizes


@pytest.mark.parametrize("name", CODED)
def test_selective_decode_matches_a_full_decode(name: str, tmp_path: Path, decoded: list[int]) -> None:
    case = CODED[name]
    path = case.make(tmp_path)
    _, shown = full_decode(path)
    rng = np.random.default_rng(0)
    count = len(shown)
    spared = 0
    for size in (*[1] * count, 2, 3, 4, 8, count):
        rows = np.sort(rng.choice(count, size, replace=False))
        with open_video(path) as file:
            for got, row in zip(file.pixels(rows), rows.tolist(), strict=True):
                assert np.array_equal(got, shown[row]), f"frame {row} of {rows}"
            spared += packets_spared(file, rows, decoded)
    assert (spared > 0) == case.spared


def test_fields_in_separate_packets_yield_whole_frames(tmp_path: Path) -> None:
    path = rewrite(kept("field_pairs.ts")(tmp_path), one_by_one, ".mkv")
    _, shown = full_decode(path)
    for frames in (1, len(shown)):
        decoded = read_frames(Clip("a", path), VideoConfig(frames=frames))
        chosen = uniform_indices(len(shown), frames)
        assert all(np.array_equal(got, shown[row]) for got, row in zip(decoded.frames, chosen, strict=True))


def packets_spared(file: VideoFile, rows: np.ndarray, decoded: list[int]) -> int:
    """How many fewer packets the frames at `rows` need because disposable packets are known."""
    decoded.clear()
    file.pixels(rows)
    lean = len([size for size in decoded if size])
    decoded.clear()
    file.index = dataclasses.replace(file.index, disposable=None)
    file.pixels(rows)
    return len([size for size in decoded if size]) - lean


@pytest.mark.parametrize("leading", [1, 3])
def test_frames_before_the_first_indexed_frame_are_skipped(leading: int, tmp_path: Path) -> None:
    """As some decoders return them of a file that was cut from another one."""
    with open_video(write_video(tmp_path / "a.mp4", frames=6)) as file:
        step = int(file.index.pts[1] - file.index.pts[0])
        early = [SimpleNamespace(pts=int(file.index.pts[0]) - n * step) for n in range(leading, 0, -1)]
        shown = [frame for packet in file._packets for frame in packet.decode()]
        packets = [SimpleNamespace(decode=lambda frame=frame: [frame]) for frame in (*early, *shown)]
        found: dict[int, np.ndarray] = {}
        stop = file._decode(packets, 0, np.arange(3), found)  # type: ignore[arg-type]
    assert stop is None
    assert found.keys() == {0, 1, 2}
