"""A clip as a child leaves it for the encoder, and how it is written to shared memory and read from there."""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egopatch.configs.schema import VideoConfig
from egopatch.extract.children.limits import reading_through
from egopatch.extract.datasets import Clip
from egopatch.extract.video.frames import DecodedClip, read_frames, read_planes
from egopatch.extract.video.indexing.cache import FileVersion, VideoCache, version_of
from egopatch.extract.video.indexing.index import VideoError
from egopatch.extract.video.opening import require_content
from egopatch.extract.video.planes import Colours, Planes
from egopatch.extract.video.transforms import Window

ALIGNMENT = 64  # bytes; copies from other addresses are slower
_HASHED_AT_ONCE = 1 << 20  # bytes; hashing a smaller file takes less time than looking up another child's hash


@dataclass(frozen=True)
class Cut:
    """How frames were cut.

    Attributes:
        whole: (H, W) of the uncut frames.
        window: The part that is left, [h, w].
        colours: Conversion of their planes to RGB; None if they are RGB.
    """

    whole: tuple[int, int]
    window: Window
    colours: Colours | None = None


@dataclass(frozen=True)
class Pixels:
    """Frames of one size and kind, cut to the part that the transform looks at.

    Attributes:
        frames: uint8 [h, w, 3] each, or planes; in the parent one array, [F, h, w, 3] or [F, 3 / 2 h w], in which a
            frame's planes follow each other.
        cut: How they were cut.
    """

    frames: Sequence[NDArray[np.uint8]] | Sequence[Planes] | NDArray[np.uint8]
    cut: Cut


def frames_and_cuts(runs: Sequence[Pixels]) -> tuple[list[Any], list[Cut]]:
    """Each frame of `runs`, in order, and how it was cut."""
    return [frame for run in runs for frame in run.frames], [run.cut for run in runs for _ in run.frames]


Frames = NDArray[np.float32] | tuple[Pixels, ...]
Finish = Callable[[DecodedClip[Any]], Frames]


def _nothing() -> None:
    """The memory belongs to the clip."""


@dataclass(frozen=True)
class PreparedClip:
    """A clip ready for the encoder.

    Attributes:
        clip: The clip.
        frames: Pixels, in the order of the frames; or the network's input, normalised float32 [T, 3, S, S], if they
            are too large for a slot.
        timestamps: [T] float32, seconds from the clip's start.
        source: SHA-256 of the video file.
        size: Size of the video file in bytes.
        seconds: Time that the child spent on the clip.
        missing_s: Seconds by which the clip's end lies beyond its video's; 0 if it does not.
        release: Must be called when `frames` are no longer needed; another clip then uses their memory.
        memory: The slot of shared memory that holds `frames` from its start on; None if they have their own memory.
        memory_used: Bytes of the slot up to the end of the frames.
        others: The frames as other kinds of encoders take them, if the clip was decoded once for several.
    """

    clip: Clip
    frames: Frames
    timestamps: NDArray[np.float32]
    source: str
    size: int
    seconds: float
    missing_s: float = 0.0
    release: Callable[[], None] = _nothing
    memory: NDArray[np.uint8] | None = None
    memory_used: int = 0
    others: tuple[Frames, ...] = ()

    def for_encoders(self, kinds: Sequence[int]) -> "list[PreparedClip]":
        """The clip for each of several encoders; its memory is released when the last of them releases it.

        Args:
            kinds: For each encoder the frames that it takes: 0 is `frames`, and the others follow.
        """
        frames, release = [self.frames, *self.others], _AfterAll(len(kinds), self.release)
        parts = []
        for number, kind in enumerate(kinds):
            own = frames[kind]
            if isinstance(own, np.ndarray) and kind in kinds[:number]:
                own = own.copy()  # an encoder may change its input in place
            # Without `memory`, because each device would register the shared memory for itself, which CUDA refuses.
            parts.append(replace(self, frames=own, others=(), release=release, memory=None))
        return parts


def read_clip(
    clip: Clip, video: VideoConfig, cache: VideoCache, finishes: Sequence[Finish], as_planes: bool = False
) -> PreparedClip:
    """Decode one clip in this process, and let each of `finishes` turn it into one kind of frames.

    Args:
        clip: The clip.
        video: How to sample and decode.
        cache: Keeps what other clips of its video can use.
        finishes: The first one's result becomes `frames`, those of the others `others`.
        as_planes: Whether they take frames as they were decoded, without conversion to RGB.

    Raises:
        VideoError: As `extract.video.frames.read_frames`, or the file was changed meanwhile.
        OSError: The file can no longer be read.
    """
    started = time.perf_counter()
    require_content(clip.video)
    before = version_of(clip.video)
    decoded = (read_planes if as_planes else read_frames)(clip, video, cache)
    frames, *others = [finish(decoded) for finish in finishes]
    version = version_of(clip.video)
    source = cache.find("sha256", version, lambda: _file_sha256(version), share=version[1] > _HASHED_AT_ONCE)
    if not before == version == version_of(clip.video):
        raise VideoError(f"video {clip.video} changed while it was being read; run `extract retry` when it is complete")
    seconds = time.perf_counter() - started
    return PreparedClip(
        clip, frames, decoded.timestamps, source, version[1], seconds, decoded.missing_s, others=tuple(others)
    )


def _file_sha256(version: FileVersion) -> str:
    path, size, _ = version
    with reading_through(size), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Place:
    """Position of an array in a slot: its first byte, shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def within(self, memory: NDArray[np.uint8]) -> NDArray:
        return memory[self.offset : self.end].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class SharedClip:
    """A prepared clip whose frames are in shared memory: small enough to be sent through a pipe."""

    prepared: PreparedClip
    places: tuple[_Place, ...]

    @classmethod
    def write(cls, prepared: PreparedClip, memory: NDArray[np.uint8]) -> "SharedClip":
        """Copy the frames of `prepared` into `memory`, which is large enough; they are copied only here."""
        places: list[_Place] = []
        runs = _runs(prepared)
        for run in runs:
            start = -(-places[-1].end // ALIGNMENT) * ALIGNMENT if places else 0
            first = run[0]
            if isinstance(first, Planes):
                places.append(_Place(start, (len(run), first.nbytes), "|u1"))
            else:
                places.append(_Place(start, (len(run), *first.shape), first.dtype.str))
            for frame, target in zip(run, places[-1].within(memory), strict=True):
                if isinstance(frame, Planes):
                    frame.copy_to(target)
                else:
                    np.copyto(target, frame)
        return cls(_with_runs(prepared, (run[:0] for run in runs)), tuple(places))

    def read(self, memory: NDArray[np.uint8], release: Callable[[], None]) -> PreparedClip:
        """The clip with its frames in `memory`, not copied."""
        runs, used = (place.within(memory) for place in self.places), self.places[-1].end
        return _with_runs(self.prepared, runs, release=release, memory=memory, memory_used=used)


def _runs(prepared: PreparedClip) -> list[Any]:
    """The frames of each kind in runs of one size, each a sequence of arrays or `Planes`."""
    runs: list[Any] = []
    for frames in (prepared.frames, *prepared.others):
        runs += [frames] if isinstance(frames, np.ndarray) else [run.frames for run in frames]
    return runs


def _with_runs(prepared: PreparedClip, runs: Iterator[Any], **changes: Any) -> PreparedClip:
    """The clip with other `_runs`, in the same order, and other fields."""
    first, *others = (
        next(runs) if isinstance(frames, np.ndarray) else tuple(replace(run, frames=next(runs)) for run in frames)
        for frames in (prepared.frames, *prepared.others)
    )
    return replace(prepared, frames=first, others=tuple(others), **changes)


class _AfterAll:
    """Calls `action` at the last of `count` calls, from any thread."""

    def __init__(self, count: int, action: Callable[[], None]) -> None:
        self._left = count
        self._action = action
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._action()
