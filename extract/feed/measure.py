"""Measures how fast children decode, under the conditions of a job."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.pool import TOGETHER, DecodePool, Prepared, UndecodedClip

MEASURED_S = 1.0  # at least; meanwhile the pool finds out how many clips share a task


@dataclass(frozen=True)
class MeasuredDecoding(Generic[Prepared]):
    """The result of a measurement.

    Attributes:
        first: The first result of each clip; its frames are not released.
        decoded, failed: Numbers of clips that could and could not be decoded in the time measured.
        seconds: The time measured.
    """

    first: list[Prepared | UndecodedClip]
    decoded: int
    failed: int
    seconds: float


def measure_decoding(pool: DecodePool[Prepared], clips: Sequence[Clip], decoders: int) -> MeasuredDecoding[Prepared]:
    """Decode `clips` in turn with all `decoders` children of `pool`, which must be closed afterwards.

    The children's start and first clips do not count; the measurement lasts for at least two clips per child.
    """
    results = pool.map(itertools.cycle(clips), together=TOGETHER)
    first = list(itertools.islice(results, len(clips)))
    for result in itertools.islice(results, max(decoders - len(clips), 0)):
        _release(result)
    decoded = failed = 0
    started = time.perf_counter()
    while (seconds := time.perf_counter() - started) < MEASURED_S or decoded + failed < 2 * decoders:
        result = next(results)
        _release(result)
        failed += isinstance(result, UndecodedClip)
        decoded += not isinstance(result, UndecodedClip)
    return MeasuredDecoding(first, decoded, failed, seconds)


def _release(result: object) -> None:
    if isinstance(result, PreparedClip):
        result.release()
