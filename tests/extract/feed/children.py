"""What children do in tests of the pool; run as a program, what a child that only decodes is like."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.cut import cut_clip
from egopatch.extract.feed.pool import DecodePool
from egopatch.extract.video.once import OncePerVideo
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM

HEAVY = ("torch", "transformers", "zarr", "h5py", "ray", "matplotlib")


def die_or_prepare(clip: Clip, video: VideoConfig, once: OncePerVideo) -> PreparedClip:
    if clip.clip_id == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return cut_clip(clip, video, once, transform=EGOVLP_TRANSFORM, most=1 << 20)


def about_this_child(clip: Clip, video: VideoConfig, once: OncePerVideo) -> tuple[float, int, list[str]]:
    """CPU seconds to the first frames, bytes of memory, modules that should not be here."""
    cut_clip(clip, video, once, transform=EGOVLP_TRANSFORM, most=1 << 30)
    # CPU time, because the machine may be busy.
    return time.process_time(), psutil.Process().memory_info().rss, [name for name in HEAVY if name in sys.modules]


if __name__ == "__main__":
    from tests.extract.feed import children  # by its full name, which the child knows

    with DecodePool(VideoConfig(), 1, children.about_this_child) as pool:
        (result,) = pool.map([Clip("a", Path(sys.argv[1]))])
    assert isinstance(result, tuple), result
    seconds, memory, heavy = result
    print(seconds, memory, *heavy)
