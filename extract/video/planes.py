"""Frames as most decoders return them: brightness in full, and colours that four pixels share (Y, U and V, 4:2:0).

They take half the bytes of RGB, and a device converts them in no time, so that children need not. The result is exactly
FFmpeg's: each of R, G and B is a sum of whole numbers that Y, U and V contribute, clipped to 0 to 255, and the numbers
are read off frames that FFmpeg has converted. If its pixels are not such sums, frames become RGB as usual.
"""

import functools
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from egopatch.extract.video.transforms import Window

_FORMATS = ("yuv420p", "yuvj420p")
_NEUTRAL = 128  # U and V of grey
_CHECKED_ROWS = 32  # rows of a random frame as wide as the video: FFmpeg's conversion may depend on a pixel's column
_KNOWN = 64  # kinds of frames whose colours are kept


@dataclass(frozen=True)
class Colours:
    """The contributions of Y, U and V to R, G and B.

    Attributes:
        tables: int16 [5, 256]: of Y to each, of V to R, of U to G, of V to G, of U to B.
    """

    tables: bytes

    def array(self) -> NDArray[np.int16]:
        """The tables as an array."""
        return np.frombuffer(self.tables, np.int16).reshape(5, 256)


@dataclass(frozen=True)
class Planes:
    """One frame.

    Attributes:
        y: uint8 [H, W]; H and W are even.
        u, v: uint8 [H / 2, W / 2].
        colours: Their contributions to R, G and B.
    """

    y: NDArray[np.uint8]
    u: NDArray[np.uint8]
    v: NDArray[np.uint8]
    colours: Colours

    def __post_init__(self) -> None:
        height, width = self.y.shape
        for plane in (self.u, self.v):
            if (2 * plane.shape[0], 2 * plane.shape[1]) != (height, width):
                raise ValueError(f"u or v has shape {plane.shape}; expected half of y's, {(height, width)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.y.shape[0], self.y.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the three planes."""
        return self.y.size + self.u.size + self.v.size

    def cut(self, window: Window) -> "Planes":
        """A part whose place and size are even; nothing is copied."""
        rows, columns = window.rows, window.columns
        halved = tuple(slice(part.start // 2, part.stop // 2) for part in (rows, columns))
        return Planes(self.y[rows, columns], self.u[halved], self.v[halved], self.colours)

    def copy_to(self, memory: NDArray[np.uint8]) -> None:
        """Write y, u and v one after another into `memory` [nbytes]."""
        start = 0
        for plane in (self.y, self.u, self.v):
            np.copyto(memory[start : start + plane.size].reshape(plane.shape), plane)
            start += plane.size

    def rgb(self) -> NDArray[np.uint8]:
        """[H, W, 3], FFmpeg's pixels."""
        of_y, v_to_r, u_to_g, v_to_g, u_to_b = self.colours.array()
        offsets = np.stack([v_to_r[self.v], u_to_g[self.u] + v_to_g[self.v], u_to_b[self.u]], axis=-1)
        pixels = of_y[self.y][..., None] + offsets.repeat(2, axis=0).repeat(2, axis=1)
        return pixels.clip(0, 255).astype(np.uint8)


def even(window: Window) -> Window:
    """The smallest window around this one that `Planes.cut` takes."""
    top, left = window.top // 2 * 2, window.left // 2 * 2
    bottom, right = window.top + window.height, window.left + window.width
    return Window(top, left, bottom + bottom % 2 - top, right + right % 2 - left)


def planes_of(frame: "av.VideoFrame") -> Planes | None:
    """The frame's planes in the decoder's memory; None if its colours are not sums of the planes' contributions."""
    if frame.interlaced_frame:  # lines of one field share colours
        return None
    colours = find_colours(frame.format.name, frame.colorspace, frame.color_range, frame.width, frame.height)
    if colours is None or any(plane.line_size < 0 for plane in frame.planes):  # the last line comes first
        return None
    planes = zip(frame.planes, _shapes(frame.width, frame.height), strict=True)
    y, u, v = (
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :width]
        for plane, (height, width) in planes
    )
    return Planes(y, u, v, colours)


@functools.lru_cache(_KNOWN)
def find_colours(name: str, colorspace: int, color_range: int, width: int, height: int) -> Colours | None:
    """FFmpeg's conversion of frames of a size and a format, as PyAV names it; None if no `Colours` describe it."""
    if name not in _FORMATS or width % 2 or height % 2:
        return None
    colours = _measured(name, colorspace, color_range)
    if colours is None:
        return None
    rng = np.random.default_rng(0)
    y, u, v = (rng.integers(0, 256, shape, np.uint8) for shape in _shapes(width, min(height, _CHECKED_ROWS)))
    planes = Planes(y, u, v, colours)
    return colours if np.array_equal(planes.rgb(), _converted(planes, name, colorspace, color_range)) else None


@functools.lru_cache(_KNOWN)
def _measured(name: str, colorspace: int, color_range: int) -> Colours | None:
    """The tables, measured on every Y with every U at a neutral V, and on every Y with every V at a neutral U."""
    every = np.arange(256, dtype=np.uint8)
    every_y = every[:, None].repeat(2, axis=0).repeat(512, axis=1)
    across = np.broadcast_to(every, (256, 256))
    neutral = np.full((256, 256), _NEUTRAL, np.uint8)
    nothing = Colours(bytes(5 * 256 * 2))
    by_u, by_v = (
        _converted(Planes(every_y, u, v, nothing), name, colorspace, color_range)[::2, ::2].astype(np.int16)
        for u, v in ((across, neutral), (neutral, across))
    )
    red, *others = by_v[..., 0], by_u[..., 1], by_v[..., 1], by_u[..., 2]
    grey = red[:, _NEUTRAL]
    # V changes R by up to 200 levels, so that for each Y some V leaves R between 0 and 255, and for each V some Y.
    of_v = _added(red, grey, _is_whole(grey))
    of_y = _added(red.T, of_v)
    tables = [of_v, *(_added(pixels, of_y) for pixels in others)]
    for pixels, table in zip((red, *others), tables, strict=True):
        if not np.array_equal((of_y[:, None] + table).clip(0, 255), pixels):
            return None
    return Colours(np.stack([of_y, *tables]).tobytes())


def _added(
    pixels: NDArray[np.int16], known: NDArray[np.int16], usable: NDArray[np.bool_] | bool = True
) -> NDArray[np.int16]:
    """The number that each column adds to `known`, [rows], to give `pixels`, [rows, columns]; from a `usable` row."""
    row = (_is_whole(pixels) & np.broadcast_to(usable, known.shape)[:, None]).argmax(axis=0)
    return pixels[row, np.arange(pixels.shape[1])] - known[row]


def _is_whole(pixels: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Whether each value is unclipped."""
    return (pixels > 0) & (pixels < 255)


def _converted(planes: Planes, name: str, colorspace: int, color_range: int) -> NDArray[np.uint8]:
    """The planes' pixels, [H, W, 3], by FFmpeg."""
    height, width = planes.shape
    frame = av.VideoFrame(width, height, name)
    frame.colorspace, frame.color_range = colorspace, color_range
    for plane, content in zip(frame.planes, (planes.y, planes.u, planes.v), strict=True):
        lines = np.zeros((len(content), plane.line_size), np.uint8)
        lines[:, : content.shape[1]] = content
        plane.update(lines.tobytes())
    return to_rgb(frame, VideoReformatter())


def to_rgb(frame: "av.VideoFrame", reformatter: VideoReformatter) -> NDArray[np.uint8]:
    """The frame's pixels, [H, W, 3]. Frames share a reformatter, because a new one takes 17 microseconds."""
    pixels: NDArray[np.uint8] = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()  # type: ignore[assignment]
    return pixels


def _shapes(width: int, height: int) -> tuple[tuple[int, int], ...]:
    """Shapes of Y, U and V."""
    halved = height // 2, width // 2
    return (height, width), halved, halved
