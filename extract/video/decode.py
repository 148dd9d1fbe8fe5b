"""Decoding in child processes that can be killed, because a damaged video may hang its decoder or exhaust memory.

Each child decodes and transforms one clip at a time, under a time limit and a memory limit. It returns only the
finished tensor, so that resizing is spread over the children too.
"""

import functools
import hashlib
import multiprocessing
import os
import resource
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video.container import FrameIndexes, VideoError
from egopatch.extract.video.frames import read_frames
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform, to_input
from egopatch.features.common.parent import exit_with_parent

Prepared = TypeVar("Prepared")

GIB = 1024**3
MEMORY_POLL_S = 0.02
OUT_OF_MEMORY = 117  # exit code of a child that ended itself because it used too much memory


@dataclass(frozen=True)
class PreparedClip:
    """A clip ready for the encoder.

    Attributes:
        clip: The clip.
        frames: [T, 3, S, S] float32, normalised.
        timestamps: [T] float32, seconds from the clip's start.
        source: SHA-256 of the video file.
        seconds: Time that the child spent on the clip.
    """

    clip: Clip
    frames: NDArray[np.float32]
    timestamps: NDArray[np.float32]
    source: str
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
        prepare: Function that a child calls for each clip.
    """

    def __init__(self, video: VideoConfig, workers: int, prepare: Callable[[Clip, VideoConfig], Prepared]) -> None:
        self._video = video
        self._workers = workers
        self._prepare = prepare
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
        return self._pool.schedule(self._prepare, args=(clip, self._video), timeout=self._video.timeout_s)

    def _result(self, clip: Clip, future: ProcessFuture) -> Prepared | UndecodedClip:
        try:
            return future.result()
        except VideoError as error:
            return UndecodedClip(clip, str(error), _child_traceback(error))
        except FutureTimeoutError:
            limit = self._video.timeout_s
            reason = f"video {clip.video} took over {limit:g} s to decode (video.timeout_s); its decoder was killed"
            return UndecodedClip(clip, reason)
        except ProcessExpired as error:
            if error.exitcode == OUT_OF_MEMORY:
                return UndecodedClip(clip, self._too_large(clip))
            return UndecodedClip(clip, f"the decoder of video {clip.video} died with exit code {error.exitcode}")
        except (MemoryError, RuntimeError) as error:
            # torch reports a refused allocation as RuntimeError.
            detail = " ".join(str(error).split())
            return UndecodedClip(clip, f"{self._too_large(clip)}: {detail}", _child_traceback(error))

    def _too_large(self, clip: Clip) -> str:
        limit = self._video.memory_gb
        return f"video {clip.video} took over {limit:g} GB of memory to decode (video.memory_gb)"


def prepare_clip(clip: Clip, video: VideoConfig, transform: Transform = EGOVLP_TRANSFORM) -> PreparedClip:
    """Decode and transform one clip in this process.

    Raises:
        VideoError: As `extract.video.frames.read_frames`.
    """
    started = time.perf_counter()
    decoded = read_frames(clip, video, _indexes())
    frames = to_input(decoded.frames, video.size, transform)
    stat = clip.video.stat()
    source = _file_sha256(clip.video, stat.st_size, stat.st_mtime_ns)
    return PreparedClip(clip, frames.numpy(), decoded.timestamps, source, time.perf_counter() - started)


# Both are cached per process, because many clips come from one long video.
@functools.cache
def _indexes() -> FrameIndexes:
    return FrameIndexes()


@functools.lru_cache(maxsize=8)
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    del size, mtime_ns
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _start_child(memory_gb: float) -> None:
    exit_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1):  # the parent handles them; it ends a child with SIGTERM
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    limit = int(memory_gb * GIB)
    threading.Thread(target=_exit_above, args=(psutil.Process().memory_info().rss + limit,), daemon=True).start()
    # The system's own limit catches growth that is faster than the polling. FFmpeg fails there without naming the
    # cause, so it is the wider of the two; it counts data, not the address space of idle threads.
    hard = psutil.Process().memory_info().data + 2 * limit
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _exit_above(limit: int) -> None:
    process = psutil.Process()
    while process.memory_info().rss <= limit:
        time.sleep(MEMORY_POLL_S)
    os._exit(OUT_OF_MEMORY)


def _child_traceback(error: BaseException) -> str:
    # pebble attaches the child's own traceback as the cause.
    return "".join(traceback.format_exception(error))
