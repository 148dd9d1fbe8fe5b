"""Files that were cut off: never wrong frames, and never a shorter video that looks complete."""

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video.frames import VideoError, read_frames
from egopatch.extract.video.indexing.declared_size import missing_bytes
from tests.extract.video.odd_videos import moving
from tests.extract.video.videos import B_FRAMES, FPS, write_video

ASF_PROPERTIES = "a1dcab8c47a9cf118ee400c00c205365"


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_file_truncated_between_b_frames_never_yields_wrong_frames(container: str, tmp_path: Path) -> None:
    """The frame that they are coded after is there, and shown later than they would be."""
    options = {"movflags": "faststart"} if container == "mp4" else {}
    path = write_video(tmp_path / f"a.{container}", 40, options=B_FRAMES, draw=moving, container=options)
    content, video = path.read_bytes(), VideoConfig(frames=4)
    clips = [Clip("a", path, start / FPS, (start + 8) / FPS - 0.01) for start in range(10, 20)]
    whole = [read_frames(clip, video).times_s.tolist() for clip in clips]
    for share in range(30, 100, 2):
        path.write_bytes(content[: len(content) * share // 100])
        for clip, times_s in zip(clips, whole, strict=True):
            with suppress(VideoError):
                assert read_frames(clip, video).times_s.tolist() == times_s


@pytest.mark.parametrize("codec", ["libx264", "ffv1"])
def test_matroska_cut_at_the_start_of_a_cluster_is_truncated(codec: str, tmp_path: Path) -> None:
    """FFmpeg logs nothing where only the cluster's header of 12 bytes is left."""
    options = B_FRAMES if codec == "libx264" else {}
    container = {"cluster_time_limit": "500"}
    path = write_video(tmp_path / "a.mkv", 40, codec=codec, options=options, draw=moving, container=container)
    content, video, said = path.read_bytes(), VideoConfig(frames=4), set[str]()
    clusters = [match.start() for match in re.finditer(rb"\x1f\x43\xb6\x75", content)]
    assert len(clusters) >= 3
    expected = read_frames(Clip("early", path, 0.0, 0.2), video)
    for cut in (cluster + more for cluster in clusters[1:] for more in range(16)):
        path.write_bytes(content[:cut])
        early = read_frames(Clip("early", path, 0.0, 0.2), video)
        np.testing.assert_array_equal(np.stack(early.frames), np.stack(expected.frames))
        with pytest.raises(VideoError, match=r"is truncated at .* s \((it is|File ended)") as refused:
            read_frames(Clip("whole", path), video)
        if f"it is {len(content) - cut} bytes shorter than it declares" in str(refused.value):
            said.add("declared")
    assert said == {"declared"}


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "libx264"), ("a.avi", "mpeg4"), ("a.wmv", "msmpeg4v3")])
def test_a_file_without_its_last_frames_or_index_is_truncated(name: str, codec: str, tmp_path: Path) -> None:
    """FFmpeg takes it for complete where it ends between two frames."""
    path = write_video(tmp_path / name, codec=codec)
    content = path.read_bytes()
    for cut in range(len(content) // 2, len(content), len(content) // 100):
        path.write_bytes(content[:cut])
        with pytest.raises(VideoError, match="; download it again"):
            read_frames(Clip("whole", path), VideoConfig(frames=4))


@pytest.mark.parametrize(
    ("container", "head", "missing"),
    [
        ("matroska,webm", "1a45dfa3 80 18538067 01ffffffffffffff ec80", 0),  # as streams are written: no size
        ("matroska,webm", "1a45dfa3 80 18538067 ff ec80", 0),
        ("matroska,webm", "1a45dfa3 80 18538067 82 ec80", 0),
        ("matroska,webm", "1a45dfa3 80 18538067 8a ec80", 8),
        ("matroska,webm", "1a45dfa3 80 18538067 010000000000000a ec80", 8),
        ("matroska,webm", "1a45dfa3 80 18538067", 0),
        ("matroska,webm", "1a45dfa3 80 18538067 00", 0),
        ("matroska,webm", "00000018 66747970", 0),
        ("matroska,webm", "", 0),
        ("avi", "52494646 04000000 41564920", 0),
        ("avi", "52494646 05000000 41564920 00", 0),  # nothing follows, so nothing pads it
        ("avi", "52494646 06000000 41564920", 2),
        ("avi", "52494646 04000000 41564920 52494646 06000000 41564958", 2),  # OpenDML: of several chunks
        ("avi", "52494646 05000000 41564920 0000 52494646 06000000 41564958", 2),
        ("avi", "52494646 00000000 41564920", 0),  # as streams are written
        ("avi", "52494646 ffffffff 41564920", 0),
        ("avi", "", 0),
        ("asf", f"{ASF_PROPERTIES} {'00' * 24} 6000000000000000 {'00' * 40} 02000000", 4),
        ("asf", f"{ASF_PROPERTIES} {'00' * 24} 6000000000000000 {'00' * 40} 03000000", 0),  # a broadcast
        ("asf", "00", 0),
        ("mpegts", "47", 0),
    ],
)
def test_missing_bytes_of_what_a_file_declares(container: str, head: str, missing: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes.fromhex(head))
    assert missing_bytes(path, container) == missing
