"""Durations of videos, read in child processes, because a damaged file may hang its reader."""

from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.pool import DecodePool, UndecodedClip
from egopatch.extract.video.container import open_video
from egopatch.extract.video.indexing.cache import VideoCache

VIDEOS_OF_A_CHILD = 16  # a child takes longer to start than to read so many


def durations_s(videos: Sequence[Path], video: VideoConfig, workers: int) -> list[float | None]:
    """Seconds at which each video's last frame disappears; None for one that cannot be read.

    Args:
        videos: The files.
        video: Limits of a child's time and memory.
        workers: Largest number of child processes.
    """
    if not videos:
        return []
    children = min(workers, -(-len(videos) // VIDEOS_OF_A_CHILD))
    with DecodePool(video, children, _duration_s) as pool:
        found = pool.map([Clip(path.name, path) for path in videos])
        return [None if isinstance(end, UndecodedClip) else end for end in found]


def _duration_s(clip: Clip, video: VideoConfig, cache: VideoCache) -> float:
    with open_video(clip.video, cache) as file:
        return float(file.index.end_s)
