"""Starts a job's decoder children, and decides what they leave in shared memory and how much of it they get."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import psutil

from egopatch.configs.schema import VideoConfig
from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.feed.clips import ALIGNMENT, Finish, PreparedClip, read_clip
from egopatch.extract.feed.cut import cut_clip, finish_cut
from egopatch.extract.feed.on_host import finish_on_host, prepare_clip
from egopatch.extract.feed.pool import DecodePool, slots_for
from egopatch.extract.video.transforms import Transform

LARGEST_SIDE = 1080  # a slot holds a square of pixels of up to this side


def open_decoders(
    video: VideoConfig, transform: Transform, workers: int, clips: int, cut: bool
) -> DecodePool[PreparedClip]:
    """Children that leave clips in slots of shared memory.

    Args:
        video: Number and size of frames, and limits.
        transform: Transform of the network.
        workers: Number of child processes.
        clips: Number of clips in memory if they come one by one: those decoded ahead, those whose frames are in use
            while the next one is awaited, and that one.
        cut: Whether children leave cut pixels, for a device that transforms them, rather than finished input. Slots
            take at most a quarter of the free memory together; pixels that exceed a slot are transformed by the child.
    """
    slots = slots_for(clips, workers)
    most, slot_bytes = _sizes(video, slots, cut)
    prepare = partial(cut_clip, transform=transform, most=most) if cut else partial(prepare_clip, transform=transform)
    return DecodePool(video, workers, prepare, _frame_slots(slots, slot_bytes))


def open_decoders_of_several(
    encoders: Sequence[tuple[VideoConfig, Transform, bool]], workers: int, clips: int
) -> tuple[DecodePool[PreparedClip], list[int]]:
    """As `open_decoders`, for several encoders whose frames differ only in size, each with its own `cut`.

    Returns:
        The children; and for each encoder the kind of frames that it takes, for `PreparedClip.shared`.
    """
    finishes: list[Finish] = []
    slots, slot_bytes = slots_for(clips, workers), 0
    distinct = list(dict.fromkeys((video.size, transform, cut) for video, transform, cut in encoders))
    video = encoders[0][0]
    for size, transform, cut in distinct:
        most, needed = _sizes(replace(video, size=size), slots * len(distinct), cut)
        slot_bytes += -(-needed // ALIGNMENT) * ALIGNMENT
        finish = partial(finish_cut, most=most) if cut else finish_on_host
        finishes.append(partial(finish, size=size, transform=transform))
    kinds = [distinct.index((video.size, transform, cut)) for video, transform, cut in encoders]
    as_planes = all(cut for _, _, cut in distinct)  # if one encoder needs RGB, frames are converted once for all
    prepare = partial(read_clip, finishes=finishes, as_planes=as_planes)
    return DecodePool(video, workers, prepare, _frame_slots(slots, slot_bytes)), kinds


def _frame_slots(count: int, slot_bytes: int) -> SharedSlots:
    return SharedSlots(count, slot_bytes, "frames between decoders and encoder", "engine.decoders")


def _sizes(video: VideoConfig, clips: int, cut: bool) -> tuple[int, int]:
    """Largest number of bytes of pixels that a clip leaves untransformed, and number of bytes of its slot."""
    finished = 4 * video.frames * 3 * video.size**2
    if not cut:
        return 0, finished
    most = min(video.frames * 3 * LARGEST_SIDE**2, psutil.virtual_memory().available // 4 // clips)
    return most, max(finished, most) + ALIGNMENT * video.frames
