"""Frames as a player shows them: turned and mirrored by the file's display matrix."""

from pathlib import Path

import av
import av.filter
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from egopatch.extract.video.indexing.index import VideoError
from egopatch.extract.video.nvdec import downloaded
from egopatch.extract.video.planes import Planes, planes_of, to_rgb


class Upright:
    """Turns the frames of the video at `path` upright.

    Reading a frame's side data keeps its memory until Python collects cycles, so the decoder would need new memory for
    each: 26 microseconds a frame. So frames for which FFmpeg reports the same rotation share the matrix of the first of
    them. A video that is flipped upside down only from some frame on, without a rotation, is not recognised.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._matrices: dict[int, bytes | None] = {}
        self._reformatter = VideoReformatter()

    def __call__(self, frame: "av.VideoFrame") -> NDArray[np.uint8]:
        """The frame's pixels as uint8 [H, W, 3], upright. Pixels that are not square stay as they are stored.

        Raises:
            VideoError: The display matrix turns the frame by an angle that is not a multiple of 90 degrees.
        """
        frame = downloaded(self._path, frame)  # with its side data, which no filter can remove on a GPU
        pixels, matrix = to_rgb(frame, self._reformatter), self._matrix(frame)
        if matrix is None:
            return pixels
        # (x, y) is shown at (a x + c y, b x + d y); 16.16 fixed point.
        a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()
        if (a or d) and (b or c):
            raise VideoError(f"video {self._path} is rotated by an odd angle; expected 0, 90, 180 or 270 degrees")
        if b or c:
            pixels, a, d = pixels.transpose(1, 0, 2), c, b
        return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])

    def planes(self, frame: "av.VideoFrame") -> Planes | NDArray[np.uint8]:
        """The frame's planes if it is upright and they determine its pixels; else the result or error of a call."""
        frame = downloaded(self._path, frame)
        planes = planes_of(frame) if self._matrix(frame) is None else None
        return self(frame) if planes is None else planes

    def _matrix(self, frame: "av.VideoFrame") -> bytes | None:
        if frame.rotation not in self._matrices:
            self._matrices[frame.rotation] = _display_matrix(frame)
        return self._matrices[frame.rotation]


def _display_matrix(frame: "av.VideoFrame") -> bytes | None:
    while True:
        try:
            matrix = frame.side_data.get("DISPLAYMATRIX")
        except ValueError as error:  # "31 is not a valid Type": PyAV has no name for some side data, such as EXIF
            frame = _without_side_data(frame, int(str(error).split()[0]))
        else:
            return None if matrix is None else bytes(matrix)


def _without_side_data(frame: "av.VideoFrame", number: int) -> "av.VideoFrame":
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("sidedata", f"mode=delete:type={number}"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()
