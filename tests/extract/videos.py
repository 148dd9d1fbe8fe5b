"""Small real H.264 files whose every frame says which one it is."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def level_of(index: int) -> int:
    """Grey level that frame `index` is filled with: far enough apart to survive compression."""
    return 20 + 6 * index


def write_video(
    path: Path,
    frames: int = 30,
    fps: int = 15,
    size: tuple[int, int] = (96, 64),
    pts: list[int] | None = None,
) -> Path:
    """Grey frames of rising level; `size` is (width, height); `pts` in milliseconds makes the frame rate vary."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10", "preset": "ultrafast"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        time_base = Fraction(1, 1000) if pts else Fraction(1, fps)
        stream.codec_context.time_base = time_base
        for index in range(frames):
            pixels = np.full((size[1], size[0], 3), level_of(index), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = pts[index] if pts else index
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Which frames these are: inverse of `level_of`, for [T, H, W, 3]."""
    return [round((float(frame.mean()) - 20) / 6) for frame in frames]
