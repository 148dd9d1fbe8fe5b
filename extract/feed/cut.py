"""Cuts decoded frames to the part that the transform looks at, for a device that transforms them.

Children that do this need no torch, whose import would cost each of them a second and 200 MB.
"""

from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egopatch.extract.children.limits import clock_stopped
from egopatch.extract.feed.clips import Cut, Frames, Pixels
from egopatch.extract.video.frames import DecodedClip
from egopatch.extract.video.planes import Colours, Planes, even
from egopatch.extract.video.transforms import Transform, Window


def finish_cut(decoded: DecodedClip[Any], size: int, transform: Transform, most: int) -> Frames:
    """The frames cut to what `transform` looks at, or the network's input if these exceed `most` bytes."""
    runs = _cut(decoded, transform)
    if sum(frame.nbytes for run in runs for frame in run.frames) <= most:
        return runs
    with clock_stopped():  # importing torch is no part of the clip's work
        from egopatch.extract.feed.on_host import finish_on_host
    pixels = tuple(frame.rgb() if isinstance(frame, Planes) else frame for frame in decoded.frames)
    return finish_on_host(replace(decoded, frames=pixels), size, transform)


def _cut(decoded: DecodedClip[Any], transform: Transform) -> tuple[Pixels, ...]:
    """The frames in runs of equal size and kind; nothing is copied."""
    runs = []
    for (size, colours), frames in groupby(decoded.frames, _size_and_colours):
        window = transform.looks_at(*size)
        if colours is not None:
            window = even(window)
        runs.append(Pixels([_part(frame, window) for frame in frames], Cut(size, window, colours)))
    return tuple(runs)


def _size_and_colours(frame: NDArray[np.uint8] | Planes) -> tuple[tuple[int, int], Colours | None]:
    height, width = frame.shape[:2]
    return (height, width), frame.colours if isinstance(frame, Planes) else None


def _part(frame: NDArray[np.uint8] | Planes, window: Window) -> Any:
    if isinstance(frame, Planes):
        return frame.cut(window)
    return frame[window.top : window.top + window.height, window.left : window.left + window.width]
