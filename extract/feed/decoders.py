"""Starts a job's decoder children, and decides what they leave in shared memory and how much of it they get."""

from collections.abc import Sequence
from functools import partial

import psutil

from egopatch.configs.schema import VideoConfig
from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.feed.clips import ALIGNMENT, Finish, PreparedClip, read_clip
from egopatch.extract.feed.pixels import FrameKind, finish_pixels
from egopatch.extract.feed.pool import DecodePool, slots_for

LARGEST = 1080 * 1080  # pixels of the largest cut frame that a slot holds; a child transforms larger ones


def open_decoders(video: VideoConfig, kinds: Sequence[FrameKind], workers: int, clips: int) -> DecodePool[PreparedClip]:
    """Children that decode each clip once and leave its frames in a slot of shared memory, once for each of `kinds`.

    Pixels take at most a quarter of the free memory, for all kinds and slots together.

    Args:
        video: Number of frames, and limits.
        kinds: The kinds of frames, each different; the first becomes a clip's `frames`, the others its `others`.
        workers: Number of child processes.
        clips: Number of clips in memory if they come one by one: those decoded ahead, those whose frames are in use
            while the next one is awaited, and that one.
    """
    slots, slot_bytes = slots_for(clips, workers), 0
    finishes: list[Finish] = []
    for kind in kinds:
        most, needed = _sizes(video.frames, kind, slots * len(kinds))
        slot_bytes += -(-needed // ALIGNMENT) * ALIGNMENT
        finishes.append(partial(finish_pixels, kind=kind, most=most))
    as_planes = all(kind.planes for kind in kinds)  # if one encoder needs RGB, frames are converted once for all
    prepare = partial(read_clip, finishes=finishes, as_planes=as_planes)
    memory = SharedSlots(slots, slot_bytes, "frames between decoders and encoder", "engine.decoders")
    return DecodePool(video, workers, prepare, memory)


def _sizes(frames: int, kind: FrameKind, clips: int) -> tuple[int, int]:
    """Largest number of bytes of pixels that a clip leaves untransformed, and number of bytes of its slot."""
    finished = 4 * frames * 3 * kind.size**2
    most = min(frames * 3 * LARGEST, psutil.virtual_memory().available // 4 // clips)
    return most, max(finished, most) + ALIGNMENT * frames
