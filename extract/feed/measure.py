"""How fast children decode, measured as a job has them do it."""

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
    """What was measured.

    Attributes:
        first: What became of each clip at first; frames in it are not released.
        decoded, failed: Number of clips that were decoded, or could not be, in the time measured.
        seconds: That time.
    """

    first: list[Prepared | UndecodedClip]
    decoded: int
    failed: int
    seconds: float


def measure_decoding(pool: DecodePool[Prepared], clips: Sequence[Clip], decoders: int) -> MeasuredDecoding[Prepared]:
    """Decode `clips` in turn with all `decoders` children of `pool`, which is to be closed afterwards.

    The children's start and the first of their clips do not count; then each has two clips at least.
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
