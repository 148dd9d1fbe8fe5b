"""Decoding in child processes that can be killed, because a damaged video may hang its decoder or exhaust memory.

Each child works on one clip at a time, under a time limit and a memory limit, and leaves its frames in a slot of shared
memory. Any fault of a clip comes back as text in an `UndecodedClip`, because an exception itself might not survive the
pipe.
"""

import errno
import functools
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

from egopatch.configs.schema import Config, VideoConfig
from egopatch.extract.children.limits import OUT_OF_MEMORY, OUT_OF_TIME, limits, prepare_child
from egopatch.extract.children.slots import SharedSlots, inherit, inherited
from egopatch.extract.children.spawned import ChildDied, SpawnedPool
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import PreparedClip, SharedClip
from egopatch.extract.feed.shared_folder import SharedFolder
from egopatch.extract.video.indexing.cache import VideoCache
from egopatch.extract.video.indexing.index import VideoError
from egopatch.features.common.machine import usable_cores
from egopatch.features.common.os_errors import NO_SPACE

NICENESS = 5
# On a node with a GPU, each task costs this process about a millisecond, as long as the GPU takes to encode a clip. So
# quick clips share a task of about `TASK_S` seconds and at most `TOGETHER` clips.
TASK_S = 0.1
TOGETHER = 4
# Number of tasks over which a clip's mean time is averaged, so that a single slow one hardly changes it.
AVERAGED_TASKS = 8
Prepared = TypeVar("Prepared")
Prepare = Callable[[Clip, VideoConfig, VideoCache], Prepared]


@dataclass(frozen=True)
class UndecodedClip:
    """A clip that could not be decoded: the reason in one line, the traceback if there is one, and the time it took."""

    clip: Clip
    reason: str
    traceback: str = ""
    seconds: float = 0.0


class DecodePool(Generic[Prepared]):
    """Child processes that turn clips into something else, such as frames; use it as a context manager.

    Args:
        video: Number and size of frames, and limits.
        workers: Number of child processes.
        prepare: Function that a child calls for each clip, with `video` and the children's cache of videos.
        slots: Memory for the frames of every `PreparedClip`: a slot for each clip that is decoded ahead (see `map`),
            for the one that is taken next, and for each that the caller has not released by then. None sends results
            through a pipe, which is slow for frames.
    """

    def __init__(
        self, video: VideoConfig, workers: int, prepare: Prepare[Prepared], slots: SharedSlots | None = None
    ) -> None:
        self._video = video
        self._workers = workers
        self._prepare = prepare
        self._slots = slots
        self._shared = SharedFolder(video)
        try:
            # A child imports what `prepare` needs before its first clip.
            self._children = SpawnedPool("decoding", workers, _start_child, video.memory_gb, slots, prepare)
        except BaseException:
            self._close_memory()
            raise

    def __enter__(self) -> "DecodePool[Prepared]":
        return self

    def __exit__(self, *_: object) -> None:
        self._children.close()
        self._close_memory()

    def _close_memory(self) -> None:
        self._shared.remove()
        if self._slots:
            self._slots.close()

    def map(
        self, clips: Iterable[Clip], ahead: int | None = None, together: int = 1
    ) -> Iterator[Prepared | UndecodedClip]:
        """Decode `clips` in order, a bounded number of them ahead of the caller, so that memory stays flat.

        Args:
            clips: The clips.
            ahead: That number; by default two for each child, one in progress, and one finished or waiting.
            together: Largest number of quick clips that a child gets at a time; see `slots_for`. A clip that is tried
                again holds up the clips after it.

        The slots of clips that were decoded but not taken are lost: take all results, or close the pool.
        """
        ahead = ahead or 2 * self._workers
        upcoming, tasks = iter(clips), deque[_Task]()
        unfinished, clip_s = 0, TASK_S
        results: list[Prepared | UndecodedClip] = []
        while True:
            count = max(1, min(together, int(TASK_S / clip_s)))
            most = ahead + 2 * self._workers * (count - 1)
            while unfinished + count <= most and (group := list(islice(upcoming, count))):
                tasks.append(self._submit(group))
                unfinished += len(group)
            yield from results  # now that the children have something else to do
            if not tasks:
                return
            task, results = tasks.popleft(), []
            outcome = self._result_of(task)
            if outcome is None:
                tasks.extendleft(
                    self._schedule([clip], [slot], again=True)
                    for clip, slot in zip(reversed(task.clips), reversed(task.slots), strict=True)
                )
                continue
            if isinstance(outcome, _TaskResult):
                clip_s += (outcome.seconds / len(task.clips) - clip_s) / AVERAGED_TASKS
                results = [
                    self._received(result, slot) for result, slot in zip(outcome.results, task.slots, strict=True)
                ]
            else:
                results = [self._received(outcome, task.slots[0])]
            unfinished -= len(task.clips)

    def _submit(self, clips: list[Clip]) -> "_Task":
        return self._schedule(clips, [self._slots.take() if self._slots else None for _ in clips])

    def _schedule(self, clips: list[Clip], slots: list[int | None], again: bool = False) -> "_Task":
        future = self._children.schedule(_attempt_all, self._prepare, clips, self._video, self._shared.path, slots)
        return _Task(clips, slots, future, again)

    def _received(self, result: object, slot: int | None) -> Prepared | UndecodedClip:
        slots = self._slots
        if slots is not None and slot is not None:
            if isinstance(result, SharedClip):
                return result.read(slots.memory(slot), partial(slots.give_back, slot))  # type: ignore[return-value]
            slots.give_back(slot)  # the child has ended or reported its error, so it no longer writes
        return result  # type: ignore[return-value]

    def _result_of(self, task: "_Task") -> "_TaskResult | UndecodedClip | None":
        """The result of a task, or of its only clip if its child was killed; None if its clips are to be tried again.

        Raises:
            ChildProcessError: No child can be started.
        """
        try:
            return task.future.result()
        except ChildDied as error:
            if len(task.clips) > 1:  # trying each clip alone shows which one it was
                return None
            # The time of a job that is suspended, by Ctrl-Z or a scheduler, and of one that waits for a disk, runs on;
            # and the system kills a process if others use up the memory.
            if error.exit_code in (OUT_OF_TIME, -signal.SIGKILL) and not task.again:
                return None
            (clip,) = task.clips
            if error.exit_code == OUT_OF_MEMORY:
                return UndecodedClip(clip, _too_large(clip, self._video))
            if error.exit_code == OUT_OF_TIME:
                limit = self._video.timeout_s
                reason = f"video {clip.video} took over {limit:g} s to decode (video.timeout_s); its decoder was killed"
                return UndecodedClip(clip, reason, seconds=limit)
            return UndecodedClip(clip, f"the decoder of video {clip.video} died with exit code {error.exit_code}")


def decoder_count(config: Config, workers: int) -> int:
    """Number of decoders for each worker; `auto` divides this machine's usable cores between its `workers`."""
    if config.engine.decoders == "auto":
        return max(usable_cores() // workers, 1)
    return config.engine.decoders


def slots_for(clips: int, workers: int) -> int:
    """Number of slots for `clips` clips that come up to `TOGETHER` at a time; see `DecodePool.map`.

    `2 * workers * (TOGETHER - 1)` more clips are decoded ahead, and the others of the last task wait with the clip that
    is taken next.
    """
    return clips + (2 * workers + 1) * (TOGETHER - 1)


@dataclass(frozen=True)
class _TaskResult:
    """Results of a task's clips, and the seconds that the task took."""

    results: Sequence[object]
    seconds: float


@dataclass(frozen=True)
class _Task:
    """Clips that a child has or will get, the slots for their frames, and whether this is their second try."""

    clips: list[Clip]
    slots: list[int | None]
    future: Future[_TaskResult]
    again: bool


def _attempt_all(
    prepare: Prepare[Prepared], clips: list[Clip], video: VideoConfig, shared: Path, slots: list[int | None]
) -> _TaskResult:
    """Prepare the clips of a task in a child, each within the limits."""
    started = time.perf_counter()
    results = [_attempt(prepare, clip, video, shared, slot) for clip, slot in zip(clips, slots, strict=True)]
    return _TaskResult(results, time.perf_counter() - started)


def _attempt(
    prepare: Prepare[Prepared], clip: Clip, video: VideoConfig, shared: Path, slot: int | None
) -> Prepared | SharedClip | UndecodedClip:
    """Prepare one clip in a child, within the limits."""
    started = time.perf_counter()
    try:
        with limits(video):
            # A whole video is, as a rule, one clip: sharing what is found out about it costs more than it saves.
            whole = clip.start_s is None and clip.end_s is None
            result = prepare(clip, video, VideoCache() if whole else _cache(shared))
            if slot is not None and isinstance(result, PreparedClip):
                return SharedClip.write(result, inherited().memory(slot))
            return result
    except BaseException as error:  # this clip's, as a rule
        if isinstance(error, OSError) and error.errno in NO_SPACE:  # the next clips have no room either
            raise
        return UndecodedClip(clip, _reason(error, clip, video), traceback.format_exc(), time.perf_counter() - started)


def _reason(error: BaseException, clip: Clip, video: VideoConfig) -> str:
    if isinstance(error, VideoError):
        return str(error)
    # FFmpeg also lacks the memory that a damaged file seems to need.
    is_shortage = _is_about_memory(error)
    about = f"{_too_large(clip, video)}, or is damaged" if is_shortage else f"video {clip.video} cannot be decoded"
    return " ".join(f"{about}: {type(error).__name__}: {error}".split())


def _is_about_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch has no type of its own for an allocation that the system refuses.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _too_large(clip: Clip, video: VideoConfig) -> str:
    return f"video {clip.video} took over {video.memory_gb:g} GB of memory to decode (video.memory_gb)"


# A child works for one pool only.
@functools.cache
def _cache(shared: Path) -> VideoCache:
    return VideoCache(shared)


def _start_child(memory_gb: float, slots: SharedSlots | None, _: object) -> None:
    # All children together use all cores; the parent's work for the encoder, which is mostly short, comes first.
    os.nice(NICENESS)
    # One thread per child, whether torch is already imported or is imported later.
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if slots is not None:
        inherit(slots)
    prepare_child(memory_gb)
