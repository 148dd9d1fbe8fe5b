"""The shards of one worker: decoding, encoding and writing overlap, with bounded queues between them.

Child processes decode a little ahead of the encoder, across the ends of shards. A separate thread uses the store: it
leases the next shard and writes the previous one. At most one shard waits for the disk, then encoding waits too. So
memory does not depend on the number of clips, and the encoder waits only for a stage that is slower than itself.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from egopatch.extract.datasets import Clip
from egopatch.extract.datasets.origins import origin_of
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.pool import UndecodedClip
from egopatch.extract.worker.batch_encoder import BatchEncoder, Row
from egopatch.extract.worker.device import describe_machine
from egopatch.extract.worker.job import ExtractionJob
from egopatch.extract.worker.job_stats import JobStats, Stages
from egopatch.extract.worker.shard_writer import ShardWriter
from egopatch.features import Failure, ShardWork, Store
from egopatch.features.state.origin import Origin


@dataclass
class _Shard:
    """A leased shard in progress; each of its `expected` clips becomes a row or a failure."""

    work: ShardWork
    expected: int
    decoded: int = 0
    rows: dict[str, Row] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)


@dataclass(frozen=True)
class _Batch:
    """Clips of one shard that are encoded together; no clip if the `last` ones of a shard all failed."""

    shard: _Shard
    clips: list[PreparedClip]
    last: bool


class _TimedResults:
    """The decoders' results, and how long the caller waited: for the first result, and for all others."""

    def __init__(self, results: Iterator[PreparedClip | UndecodedClip]) -> None:
        self._results = results
        self.first_s: float | None = None
        self.others_s = 0.0
        self.decode_s = 0.0

    def __iter__(self) -> Iterator[PreparedClip | UndecodedClip]:
        return self

    def __next__(self) -> PreparedClip | UndecodedClip:
        started = time.perf_counter()
        result = next(self._results)
        waited = time.perf_counter() - started
        if self.first_s is None:
            self.first_s = waited
        else:
            self.others_s += waited
        self.decode_s += result.seconds if isinstance(result, PreparedClip) else 0.0
        return result


def encode_shards(
    job: ExtractionJob,
    store: Store,
    works: Sequence[ShardWork],
    clips: Mapping[str, Clip],
    decoders: int,
    on_progress: Callable[[int, int], None],
) -> JobStats:
    """Encode `works` into `store`.

    Args:
        job: The resolved config.
        store: Store that is open for writing.
        works: Shards, with the ids of their missing clips.
        clips: Clip of each id.
        decoders: Number of child processes that decode.
        on_progress: Called with (clips, bytes) after each batch.

    Raises:
        TooManyErrors: Checked after each shard is committed.
        StoreError: A shard cannot be written.
    """
    started = time.perf_counter()
    config = job.config
    underway: deque[_Shard] = deque()
    machine = describe_machine(job.device)
    with ExitStack() as stack:
        batches = job.open_batches()
        # Decoding runs ahead by the next batch, and by two clips for each child: one in progress and one waiting.
        ahead = batches.size + 2 * decoders
        pool = stack.enter_context(job.open_decoders(decoders, ahead + batches.held))
        writer = stack.enter_context(ShardWriter(store, config.engine.max_errors))
        stack.enter_context(batches)  # ends first: it uses the decoders' memory
        results = _TimedResults(pool.map(_leased(works, clips, writer, underway), ahead=ahead))
        for batch, rows in _encoded(batches, _batches(results, underway, batches)):
            shard = batch.shard
            shard.rows |= rows
            for clip in batch.clips:
                shard.sources[clip.clip.clip_id] = clip.source
                shard.origins[clip.clip.clip_id] = origin_of(clip.clip, config.data.root, clip.size)
            size = sum(tensor.nbytes for row in rows.values() for tensor in row.values())
            on_progress(len(rows) + (len(shard.failures) if batch.last else 0), size)
            if batch.last:
                writer.write(shard.work, shard.rows, shard.sources, shard.failures, shard.origins, machine)
        writer.wait()
    return JobStats(
        committed=writer.committed,
        quarantined=writer.quarantined,
        skipped=tuple(writer.skipped),
        stages=Stages(
            total_s=time.perf_counter() - started,
            start_s=results.first_s or 0.0,
            decode_s=results.decode_s,
            wait_decode_s=results.others_s,
            encode_s=batches.seconds,
            write_s=writer.write_s,
            wait_write_s=writer.wait_s,
        ),
    )


def _leased(
    works: Sequence[ShardWork], clips: Mapping[str, Clip], writer: ShardWriter, underway: deque[_Shard]
) -> Iterator[Clip]:
    """The clips to decode, shard by shard; a shard is added to `underway` when its first clip is requested."""
    for work, to_encode in writer.leases(works):
        # Another job may have committed some of them since the work was listed.
        ids = [clip_id for clip_id in work.ids if clip_id in to_encode]
        if ids:
            underway.append(_Shard(work, len(ids)))
            yield from (clips[clip_id] for clip_id in ids)
        else:
            writer.release(work.shard)


def _batches(
    results: Iterator[PreparedClip | UndecodedClip], underway: deque[_Shard], batches: BatchEncoder
) -> Iterator[_Batch]:
    """Batches end where shards do, so that the batches of a shard do not depend on the shard before it."""
    waiting: list[PreparedClip] = []
    for result in results:
        shard = underway[0]
        shard.decoded += 1
        if isinstance(result, UndecodedClip):
            shard.failures[result.clip.clip_id] = Failure(result.reason, result.traceback)
        else:
            batches.add(result)
            waiting.append(result)
        last = shard.decoded == shard.expected
        if last or len(waiting) == batches.size:
            yield _Batch(shard, waiting, last)
            waiting = []
        if last:
            underway.popleft()


def _encoded(batches: BatchEncoder, groups: Iterator[_Batch]) -> Iterator[tuple[_Batch, dict[str, Row]]]:
    """Rows of each batch, one batch late, so that the encoder computes while the next batch is gathered."""
    behind: tuple[_Batch, Callable[[], dict[str, Row]]] | None = None
    for batch in groups:
        finish = batches.start()
        if behind:
            yield behind[0], behind[1]()
        behind = batch, finish
    if behind:
        yield behind[0], behind[1]()
