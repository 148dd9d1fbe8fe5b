"""Decoded frames cut to what the transform looks at, for a device that transforms them.

Children that do this need no torch, which would take each of them a second and 200 MB.
"""

from functools import partial

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import Frames, Pixels, PreparedClip, read_clip
from egopatch.extract.video.frames import DecodedClip
from egopatch.extract.video.limits import clock_stopped
from egopatch.extract.video.once import OncePerVideo
from egopatch.extract.video.transforms import Transform


def cut_clip(clip: Clip, video: VideoConfig, once: OncePerVideo, *, transform: Transform, most: int) -> PreparedClip:
    """Decode one clip in this process and cut its frames to what `transform` looks at; see `on_host.prepare_clip`.

    Frames of more than `most` bytes are transformed here, which makes them small.
    """
    return read_clip(clip, video, once, partial(finish_cut, size=video.size, transform=transform, most=most))


def finish_cut(decoded: DecodedClip, size: int, transform: Transform, most: int) -> Frames:
    """Frames cut to what `transform` looks at, or the network's input where that has more than `most` bytes."""
    runs = _cut(decoded, transform)
    if sum(frame.nbytes for run in runs for frame in run.frames) <= most:
        return runs
    with clock_stopped():  # torch is no part of the clip
        from egopatch.extract.feed.on_host import finish_on_host
    return finish_on_host(decoded, size, transform)


def _cut(decoded: DecodedClip, transform: Transform) -> tuple[Pixels, ...]:
    """The frames in runs of equal size; nothing is copied."""
    runs: list[Pixels] = []
    for frame in decoded.frames:
        whole = frame.shape[:2]
        if not runs or runs[-1].whole != whole:
            runs.append(Pixels([], whole, transform.looks_at(*whole)))
        part = runs[-1].window
        assert isinstance(runs[-1].frames, list)
        runs[-1].frames.append(frame[part.top : part.top + part.height, part.left : part.left + part.width])
    return tuple(runs)
