"""Videos for `feed.py` and `gpu_stage_one.py`, and the cheapest way to decode a clip: FFmpeg alone, in a loop.

Nothing here imports torch, so that processes that only decode start fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

FPS = 30


@dataclass(frozen=True)
class Kind:
    """Videos of one kind, each a whole clip."""

    name: str
    width: int
    height: int
    seconds: float


KINDS = (Kind("320x240, 2 s", 320, 240, 2), Kind("456x256, 30 s", 456, 256, 30), Kind("1280x720, 10 s", 1280, 720, 10))


def write_video(path: Path, kind: Kind, seed: int) -> Path:
    """Write a drifting picture with blurred noise: motion to predict, and a residue to code."""
    rng = np.random.default_rng(seed)
    height, width = kind.height, kind.width
    ground = rng.integers(0, 255, (-(-height // 16), -(-width // 16), 3), np.uint8).repeat(16, 0).repeat(16, 1)
    grain = rng.integers(0, 8, (4, height, width, 3), np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for index in range(round(kind.seconds * FPS)):
            pixels = np.roll(ground[:height, :width], (index, 2 * index), (0, 1)) // 2 + grain[index % 4]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def wanted(path: Path, frames: int) -> list[int]:
    """Presentation times of the frames that the uniform rule takes from the whole file."""
    with av.open(str(path)) as file:
        times = sorted(packet.pts for packet in file.demux(video=0) if packet.pts is not None)
    bounds = np.linspace(0, len(times), frames + 1).astype(int)
    return [times[(first + last - 1) // 2] for first, last in pairwise(bounds)]


def decode_bare(path: Path, times: Sequence[int]) -> list[NDArray[np.uint8]]:
    """The frames at `times`, decoded in one pass that skips frames that are neither wanted nor referred to."""
    missing, found = set(times), {}
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        context = stream.codec_context
        context.thread_type, context.thread_count = "NONE", 1
        for packet in file.demux(stream):
            context.skip_frame = "DEFAULT" if packet.pts in missing or packet.pts is None else "NONREF"
            for frame in packet.decode():
                if frame.pts in missing:
                    missing.remove(frame.pts)
                    found[frame.pts] = frame.to_ndarray(format="rgb24", threads=1)
            if not missing:
                break
    return [found[time] for time in times]


def decode_many(paths: Sequence[Path], times: Sequence[int]) -> int:
    """Decode every file; returns the number of files, for a process pool."""
    for path in paths:
        decode_bare(path, times)
    return len(paths)
