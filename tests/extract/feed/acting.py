"""What children do in tests of the pool, most of it wrong. They import neither torch nor pytest, to start quickly."""

import errno
import os
import re
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.video.indexing.cache import VideoCache
from tests.extract.feed.children import cut_clip


class TwoArguments(Exception):
    """Pickled, and never unpickled: it is rebuilt from one argument."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Unpicklable(Exception):
    def __reduce__(self) -> str:
        raise TypeError("cannot be pickled")


def hang() -> None:
    time.sleep(60)


def hang_outside_of_python() -> None:
    """The GIL is never given back, as by a decoder that loops inside a library."""
    re.match("(a?){64}a{64}", "a" * 64)


def allocate() -> None:
    np.ones(2 * 1024**3, np.uint8)


def die() -> None:
    os._exit(3)


def leave() -> None:
    raise SystemExit(4)


def fail_to_read() -> None:
    raise OSError(errno.EIO, "Input/output error", "a.mp4")


def fail_in_torch() -> None:
    raise RuntimeError("stack expects each tensor to be equal size")


def fail_with_two_arguments() -> None:
    raise TwoArguments("this", "that")


def fail_unpicklably() -> None:
    raise Unpicklable("own text")


def act(clip: Clip, video: VideoConfig, cache: VideoCache) -> PreparedClip:
    """Cut the clip, unless its id is the name of a function above: then call that."""
    if clip.clip_id in globals():
        globals()[clip.clip_id]()
    return cut_clip(clip, video, cache)


def name_or_die(clip: Clip, *_: object) -> str:
    if clip.clip_id == "die":
        os._exit(3)
    return clip.clip_id


def be_killed_at_first(clip: Clip, *_: object) -> str:
    """As by the system, when other programs use up the memory."""
    if not clip.video.exists():
        clip.video.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return clip.clip_id


def sleep_or_name(clip: Clip, *_: object) -> str:
    time.sleep(float(clip.clip_id))
    return clip.clip_id


def use_up(clip: Clip, *_: object) -> str:
    if clip.clip_id == "files":
        with ExitStack() as stack, suppress(OSError):
            while True:
                stack.enter_context(Path(os.devnull).open())
            time.sleep(0.2)
    elif clip.clip_id == "memory":
        used = np.ones(450 * 1024**2, np.uint8)
        time.sleep(0.5)
        del used
    return clip.clip_id


def find_the_disk_full(clip: Clip, *_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{clip.clip_id}.mp4")


def niceness(clip: Clip, *_: object) -> tuple[str, int]:
    return clip.clip_id, os.nice(0)
