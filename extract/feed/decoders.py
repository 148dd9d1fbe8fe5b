"""The children of a job: what they leave in shared memory, and how much of it they get."""

from functools import partial

import psutil

from egopatch.configs.schema import VideoConfig
from egopatch.extract.feed.clips import ALIGNMENT, PreparedClip
from egopatch.extract.feed.cut import cut_clip
from egopatch.extract.feed.on_host import prepare_clip
from egopatch.extract.feed.pool import DecodePool
from egopatch.extract.feed.ring import Ring
from egopatch.extract.video.transforms import Transform

LARGEST_SIDE = 1080  # of a square of pixels that fits a slot


def open_decoders(
    video: VideoConfig, transform: Transform, workers: int, clips: int, cut: bool
) -> DecodePool[PreparedClip]:
    """Children that leave clips in a ring of shared memory.

    Args:
        video: Number and size of frames, and limits.
        transform: Transform of the network.
        workers: Number of child processes.
        clips: Number of clips that are decoded ahead, or whose frames are in use, at a time.
        cut: Whether children leave cut pixels, for a device that transforms them, rather than finished input. Pixels
            that are too many for a slot, which may have at most a quarter of the free memory together, are transformed
            nevertheless.
    """
    finished = 4 * video.frames * 3 * video.size**2
    if not cut:
        return DecodePool(video, workers, partial(prepare_clip, transform=transform), Ring(clips, finished))
    most = min(video.frames * 3 * LARGEST_SIDE**2, psutil.virtual_memory().available // 4 // clips)
    ring = Ring(clips, max(finished, most) + ALIGNMENT * video.frames)
    return DecodePool(video, workers, partial(cut_clip, transform=transform, most=most), ring)
