"""Decoding in child processes that can be killed, because a damaged video may hang its decoder or exhaust memory.

Each child decodes and transforms one clip at a time, under a time limit and a memory limit. It returns only the
finished tensor, so that resizing is spread over the children too. Whatever goes wrong with a clip comes back as text in
an `UndecodedClip`: an error itself might not survive the way through the pipe.
"""

import errno
import functools
import hashlib
import multiprocessing
import signal
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video.frames import read_frames
from egopatch.extract.video.index import VideoError
from egopatch.extract.video.limits import OUT_OF_MEMORY, OUT_OF_TIME, limits, prepare_child, reading_through
from egopatch.extract.video.once import FileVersion, OncePerVideo, version_of
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform, to_input
from egopatch.features.common.disk import require_semaphores
from egopatch.features.common.parent import exit_with_parent

Prepared = TypeVar("Prepared")
Prepare = Callable[[Clip, VideoConfig, OncePerVideo], Prepared]


@dataclass(frozen=True)
class PreparedClip:
    """A clip ready for the encoder.

    Attributes:
        clip: The clip.
        frames: [T, 3, S, S] float32, normalised.
        timestamps: [T] float32, seconds from the clip's start.
        source: SHA-256 of the video file.
        size: Size of the video file in bytes.
        seconds: Time that the child spent on the clip.
    """

    clip: Clip
    frames: NDArray[np.float32]
    timestamps: NDArray[np.float32]
    source: str
    size: int
    seconds: float


@dataclass(frozen=True)
class UndecodedClip:
    """A clip that could not be decoded: the reason in one line, and the traceback if there is one."""

    clip: Clip
    reason: str
    traceback: str = ""


class DecodePool(Generic[Prepared]):
    """Child processes that turn clips into something else, such as tensors; use it as a context manager.

    Args:
        video: Number and size of frames, and limits.
        workers: Number of child processes.
        prepare: Function that a child calls for each clip, and with what the children know about videos.
    """

    def __init__(self, video: VideoConfig, workers: int, prepare: Prepare[Prepared]) -> None:
        self._video = video
        self._workers = workers
        self._prepare = prepare
        require_semaphores("decoding in child processes")
        self._shared = tempfile.TemporaryDirectory(prefix="egopatch-", ignore_cleanup_errors=True)
        # spawn, because a forked child would inherit torch's and CUDA's threads and locks in an unknown state.
        self._pool = ProcessPool(
            max_workers=workers,
            initializer=_start_child,
            initargs=(video.memory_gb,),
            context=multiprocessing.get_context("spawn"),
        )

    def __enter__(self) -> "DecodePool[Prepared]":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()
        self._shared.cleanup()

    def map(self, clips: Iterable[Clip], ahead: int | None = None) -> Iterator[Prepared | UndecodedClip]:
        """Decode `clips` in order, at most `ahead` clips before the caller needs them, so that memory stays flat."""
        waiting: deque[tuple[Clip, ProcessFuture]] = deque()
        upcoming = iter(clips)
        # By default two for each child: one in progress, and one finished or waiting.
        for clip in islice(upcoming, ahead or 2 * self._workers):
            waiting.append((clip, self._submit(clip)))
        while waiting:
            clip, future = waiting.popleft()
            result = self._result(clip, future)
            for following in islice(upcoming, 1):
                waiting.append((following, self._submit(following)))
            yield result

    def _submit(self, clip: Clip) -> ProcessFuture:
        return self._pool.schedule(_attempt, args=(self._prepare, clip, self._video, Path(self._shared.name)))

    def _result(self, clip: Clip, future: ProcessFuture) -> Prepared | UndecodedClip:
        try:
            return future.result()
        except ProcessExpired as error:
            if error.exitcode == OUT_OF_MEMORY:
                reason = _too_large(clip, self._video)
            elif error.exitcode == OUT_OF_TIME:
                limit = self._video.timeout_s
                reason = f"video {clip.video} took over {limit:g} s to decode (video.timeout_s); its decoder was killed"
            else:
                reason = f"the decoder of video {clip.video} died with exit code {error.exitcode}"
            return UndecodedClip(clip, reason)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "the decoder processes cannot be started, or were killed before they had a clip; check the machine's"
                " free memory and its limit of processes, and run the same command again to resume"
            ) from error


def _attempt(prepare: Prepare[Prepared], clip: Clip, video: VideoConfig, shared: Path) -> Prepared | UndecodedClip:
    """Prepare one clip in a child, within the limits."""
    try:
        with limits(video):
            return prepare(clip, video, _once(shared))
    except BaseException as error:  # this clip's, whatever it is
        return UndecodedClip(clip, _reason(error, clip, video), traceback.format_exc())


def _reason(error: BaseException, clip: Clip, video: VideoConfig) -> str:
    if isinstance(error, VideoError):
        return str(error)
    about = _too_large(clip, video) if _is_about_memory(error) else f"video {clip.video} cannot be decoded"
    return " ".join(f"{about}: {type(error).__name__}: {error}".split())


def _is_about_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch has no type of its own for an allocation that the system refuses.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _too_large(clip: Clip, video: VideoConfig) -> str:
    return f"video {clip.video} took over {video.memory_gb:g} GB of memory to decode (video.memory_gb)"


def prepare_clip(
    clip: Clip, video: VideoConfig, once: OncePerVideo | None = None, transform: Transform = EGOVLP_TRANSFORM
) -> PreparedClip:
    """Decode and transform one clip in this process; `once` remembers what serves other clips of its video.

    Raises:
        VideoError: As `extract.video.frames.read_frames`, or the file was changed meanwhile.
        OSError: The file cannot be read any more.
    """
    started = time.perf_counter()
    once = OncePerVideo() if once is None else once
    before = version_of(clip.video) if clip.video.exists() else None
    decoded = read_frames(clip, video, once)
    frames = to_input(decoded.frames, video.size, transform)
    version = version_of(clip.video)
    source = once.find("sha256", version, lambda: _file_sha256(version))
    if not before == version == version_of(clip.video):
        raise VideoError(f"video {clip.video} was changed while it was read; run `extract retry` when it is complete")
    return PreparedClip(clip, frames.numpy(), decoded.timestamps, source, version[1], time.perf_counter() - started)


def _file_sha256(version: FileVersion) -> str:
    path, size, _ = version
    with reading_through(size), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# A child works for one pool only.
@functools.cache
def _once(shared: Path) -> OncePerVideo:
    return OncePerVideo(shared)


def _start_child(memory_gb: float) -> None:
    exit_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1):  # the parent handles them; it ends a child with SIGTERM
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    prepare_child(memory_gb)
