"""What a child leaves of decoded frames: the part that the transform looks at, for a device as planes if possible.

Whoever encodes also transforms. So children need no torch, whose import would cost each of them a second and 200 MB.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egopatch.extract.children.limits import clock_stopped
from egopatch.extract.feed.clips import Cut, Frames, Pixels, frames_and_cuts
from egopatch.extract.video.frames import DecodedClip
from egopatch.extract.video.planes import Colours, Planes, even
from egopatch.extract.video.transforms import Transform, Window


@dataclass(frozen=True)
class FrameKind:
    """The frames that an encoder takes.

    Attributes:
        size: Side of the network's input in pixels.
        transform: Transform of the network.
        planes: Whether planes stay planes, for a device; a CPU takes RGB.
    """

    size: int
    transform: Transform
    planes: bool


def finish_pixels(decoded: DecodedClip[Any], kind: FrameKind, most: int) -> Frames:
    """The cut pixels of the frames, or the network's input if these exceed `most` bytes."""
    runs = _runs(decoded, kind.transform)
    frames, cuts = frames_and_cuts(runs)
    if sum(frame.nbytes for frame in frames) <= most:
        return runs
    with clock_stopped():  # importing torch is no part of the clip's work
        from egopatch.extract.feed.on_host import to_input
    pixels = [frame.rgb() if isinstance(frame, Planes) else frame for frame in frames]
    return to_input(pixels, kind.size, kind.transform, cuts).numpy()


def _runs(decoded: DecodedClip[Any], transform: Transform) -> tuple[Pixels, ...]:
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
    return frame[window.rows, window.columns]
