"""What a child leaves of decoded frames: for a device, the part that the transform looks at; for a CPU, whole frames.

Whoever encodes also transforms. So children need no torch, whose import would cost each of them a second and 200 MB.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egopatch.extract.children.limits import clock_stopped
from egopatch.extract.feed.clips import Cut, Frames, Pixels
from egopatch.extract.video.frames import DecodedClip
from egopatch.extract.video.planes import Colours, Planes, even
from egopatch.extract.video.transforms import Transform, Window


@dataclass(frozen=True)
class FrameKind:
    """The frames that an encoder takes.

    Attributes:
        size: Side of the network's input in pixels.
        transform: Transform of the network.
        cut: Whether they are cut to what the transform looks at, and left as planes if possible, for a device. A CPU
            transforms whole frames in RGB: cut ones would change the last bits of its stores.
    """

    size: int
    transform: Transform
    cut: bool


def finish_pixels(decoded: DecodedClip[Any], kind: FrameKind, most: int) -> Frames:
    """The pixels of the frames, or the network's input if these exceed `most` bytes."""
    runs = _runs(decoded, kind)
    if sum(frame.nbytes for run in runs for frame in run.frames) <= most:
        return runs
    with clock_stopped():  # importing torch is no part of the clip's work
        from egopatch.extract.feed.on_host import to_input
    pixels = tuple(frame.rgb() if isinstance(frame, Planes) else frame for frame in decoded.frames)
    return to_input(pixels, kind.size, kind.transform).numpy()


def _runs(decoded: DecodedClip[Any], kind: FrameKind) -> tuple[Pixels, ...]:
    """The frames in runs of equal size and kind; nothing is copied."""
    runs = []
    for (size, colours), frames in groupby(decoded.frames, _size_and_colours):
        window = kind.transform.looks_at(*size) if kind.cut else Window(0, 0, *size)
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
