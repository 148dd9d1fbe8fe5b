"""Decodes a clip once for several encoders, and leaves it in shared memory in each form that one of them needs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import Frames, PreparedClip, read_clip
from egopatch.extract.video.cache import VideoCache
from egopatch.extract.video.frames import DecodedClip

Finish = Callable[[DecodedClip[Any]], Frames]


def prepare_together(
    clip: Clip, video: VideoConfig, cache: VideoCache, *, finishes: Sequence[Finish], as_planes: bool
) -> PreparedClip:
    """Decode one clip in this process, and let each of `finishes` make one kind of its frames."""
    others: list[Frames] = []

    def finish(decoded: DecodedClip[Any]) -> Frames:
        first, *rest = (finish_one(decoded) for finish_one in finishes)
        others.extend(rest)
        return first

    return replace(read_clip(clip, video, cache, finish, as_planes), others=tuple(others))
