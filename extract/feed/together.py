"""Decodes a clip once for several encoders, and leaves it in shared memory in each form that one of them needs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import Frames, PreparedTogether, read_clip
from egopatch.extract.video.cache import VideoCache
from egopatch.extract.video.frames import DecodedClip

Finish = Callable[[DecodedClip[Any]], Frames]


def prepare_together(
    clip: Clip,
    video: VideoConfig,
    cache: VideoCache,
    *,
    finishes: Sequence[Finish],
    part_of: Sequence[int],
    as_planes: bool,
) -> PreparedTogether:
    """Decode one clip in this process and prepare it by each of `finishes`; encoder n takes result `part_of[n]`."""
    others: list[Frames] = []

    def finish(decoded: DecodedClip[Any]) -> Frames:
        first, *rest = (finish_one(decoded) for finish_one in finishes)
        others.extend(rest)
        return first

    prepared = read_clip(clip, video, cache, finish, as_planes)
    parts = (prepared, *(replace(prepared, frames=frames) for frames in others))
    return PreparedTogether(parts, tuple(part_of))
