"""What children run in tests of the pool; run as a program, measurements of a child that only decodes."""

import os
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path

import psutil

from egopatch.configs.schema import VideoConfig
from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import PreparedClip, read_clip
from egopatch.extract.feed.pixels import FrameKind, finish_pixels
from egopatch.extract.feed.pool import DecodePool
from egopatch.extract.video.indexing.cache import VideoCache
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM

HEAVY = ("torch", "transformers", "zarr", "h5py", "ray", "matplotlib", "jsonargparse")
_finish = partial(finish_pixels, kind=FrameKind(32, EGOVLP_TRANSFORM, planes=True), most=1 << 20)
cut_clip = partial(read_clip, finishes=[_finish], as_planes=True)


def die_or_prepare(clip: Clip, video: VideoConfig, cache: VideoCache) -> PreparedClip:
    if clip.clip_id == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return cut_clip(clip, video, cache)


def count_looks(clip: Clip, video: VideoConfig, cache: VideoCache) -> int:
    """What the first of all children finds out about the video: how often one of them has looked, which is once."""

    def look() -> int:
        with clip.video.open("ab") as file:
            return file.write(b".") and file.tell()

    return cache.find("looks", (clip.video, 0, 0), look)


def about_this_child(clip: Clip, video: VideoConfig, cache: VideoCache) -> tuple[float, int, list[str]]:
    """CPU seconds to the first frames, bytes of memory, modules that should not be here."""
    cut_clip(clip, video, cache, finishes=[partial(_finish, most=1 << 30)])
    seconds = time.process_time()  # CPU time, because the machine may be busy
    read_clip(clip, video, cache, [partial(_finish, kind=FrameKind(32, EGOVLP_TRANSFORM, planes=False), most=1 << 30)])
    return seconds, psutil.Process().memory_info().rss, [name for name in HEAVY if name in sys.modules]


def describe(video: Path) -> None:
    """Print the start-up time, memory and unwanted imports of a child that only decodes."""
    from tests.extract.feed import children  # by its full name, which the child knows

    with DecodePool(VideoConfig(), 1, children.about_this_child) as pool:
        (result,) = pool.map([Clip("a", video)])
    assert isinstance(result, tuple), result
    seconds, memory, heavy = result
    print(seconds, memory, *heavy)


def decode_many(video: Path) -> None:
    """Decode a thousand clips with few open files; print the files and memory that all but the first ones add."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    config = VideoConfig(frames=2, size=32)
    before = (0, 0)
    with DecodePool(config, 2, cut_clip, SharedSlots(5, 1 << 20, "frames", "")) as pool:
        for number, result in enumerate(pool.map([Clip(str(i), video) for i in range(1000)])):
            assert isinstance(result, PreparedClip), result
            result.release()
            if number == 100:
                before = _open_files(), psutil.Process().memory_info().rss
        print(_open_files() - before[0], psutil.Process().memory_info().rss - before[1])


def _open_files() -> int:
    return psutil.Process().num_fds()


def wait_or_prepare(clip: Clip, video: VideoConfig, cache: VideoCache) -> PreparedClip:
    """The first child to get a clip waits in it."""
    begun = clip.video.with_name("begun")
    if not begun.exists():
        begun.touch()
        time.sleep(1)
    return cut_clip(clip, video, cache)


def be_suspended(video: Path) -> None:
    """Be suspended in the middle of a clip for longer than it may take; print what became of the clips."""
    from tests.extract.feed import children  # by its full name, which the child knows

    config = VideoConfig(frames=2, size=32, timeout_s=4)
    with DecodePool(config, 1, children.wait_or_prepare, SharedSlots(5, 1 << 20, "frames", "")) as pool:
        for result in pool.map([Clip(str(i), video) for i in range(2)]):
            print(getattr(result, "reason", "decoded"), flush=True)


def wait_for_the_end(video: Path) -> None:
    """Have children with slots, print their numbers, and wait to be killed."""
    with DecodePool(VideoConfig(frames=2, size=32), 2, cut_clip, SharedSlots(5, 1 << 20, "frames", "")) as pool:
        results = list(pool.map([Clip(str(i), video) for i in range(4)]))
        assert all(isinstance(result, PreparedClip) for result in results), results
        print(pool._shared.path, *(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
        signal.pause()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
