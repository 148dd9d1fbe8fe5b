from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.transcoding import hint
from egopatch.extract.transcoding.hint import gpu_decoder_hint, long_groups_hint, needed_frames
from egopatch.extract.video import container
from egopatch.extract.video.frames import read_frames
from tests.extract.video.videos import B_FRAMES, write_video


def long_clip(to: Path) -> Clip:
    """The last of ten seconds in one group."""
    video = write_video(to / "a.mp4", frames=38, fps=4, options={**B_FRAMES, "g": "250"})
    return Clip("a", video, 8.0, 9.4)


def test_needed_frames_match_the_packets_sent_to_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VideoConfig(frames=2)
    clip = long_clip(tmp_path)
    needed = needed_frames(clip, config)
    assert needed.group_s == 9.5
    sizes: list[int] = []
    decode = container.decode
    monkeypatch.setattr(container, "decode", lambda packet: sizes.append(packet.size) or decode(packet))
    read_frames(clip, config)
    # The decoder also gets what the last frame refers to and is shown later.
    assert needed.now <= len([size for size in sizes if size]) <= needed.now + 4
    assert needed.copied < needed.now / 4


def test_distant_key_frames_produce_a_hint(tmp_path: Path) -> None:
    line = long_groups_hint([long_clip(tmp_path)], VideoConfig(frames=2))
    assert line is not None
    assert "because key frames are 9.5 s apart" in line
    assert "egopatch extract transcode --config CONFIG --out DIR" in line
    short = Clip("b", write_video(tmp_path / "b.mp4", options=B_FRAMES))
    assert long_groups_hint([short, Clip("gone", tmp_path / "gone.mp4")], VideoConfig(frames=8)) is None


def test_gpu_decoder_hint_requires_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egopatch.extract.video.nvdec._settings", lambda primary: _NoGpu())
    assert gpu_decoder_hint([long_clip(tmp_path)], VideoConfig(), 1) is None


def test_gpu_decoder_hint_names_the_faster_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a stand-in for a GPU that decodes twice as fast as this CPU."""
    monkeypatch.setattr(hint, "require_gpu_decoder", lambda: None)
    monkeypatch.setattr(hint, "DecodePool", lambda video, *_: nullcontext(video.decoder))
    seconds = {"pyav": 2.0, "nvdec": 1.0}
    monkeypatch.setattr(hint, "measure_decoding", lambda pool, *_: SimpleNamespace(decoded=10, seconds=seconds[pool]))
    line = gpu_decoder_hint([long_clip(tmp_path)], VideoConfig(), 3)
    assert line is not None
    assert line.startswith("video.decoder nvdec is faster: 3 decoders read 5.0 clips/s with pyav and 10.0 with nvdec")


class _NoGpu:
    def create(self, _: object) -> None:
        raise NotImplementedError("no GPU")
