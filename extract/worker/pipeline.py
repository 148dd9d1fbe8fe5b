"""The shards of one worker: decoding, encoding and writing overlap, with bounded queues between them.

One decode of a clip can serve several stores. Each has its own encoder, leases, ledger and threads for writing.

Child processes decode a little ahead of the encoder, across the ends of shards. Separate threads lease the next shard
and write the previous ones. If too many are unwritten, encoding waits. So memory does not depend on the number of
clips, and the encoder waits only for a stage that is slower than itself.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from egopatch.extract.datasets import Clip
from egopatch.extract.datasets.origins import origin_of
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.decoders import open_decoders
from egopatch.extract.feed.pool import TOGETHER, UndecodedClip
from egopatch.extract.worker.batch_encoder import BatchEncoder, EncodedBatch
from egopatch.extract.worker.device import describe_machine
from egopatch.extract.worker.job import ExtractionJob
from egopatch.extract.worker.job_stats import JobStats, Stages
from egopatch.extract.writing.shard_writer import BackgroundShardWriter, EncodedShard
from egopatch.features import Failure, ShardWork, Store
from egopatch.features.common.signals import raise_dropped_requeue

OnProgress = Callable[[int, int], None]  # `fill_stores` says what it is called with
# A clip may end that much later than its video without a note, because annotations have rounded times.
ROUNDING_S = 1.0


@dataclass
class _Shard:
    """A leased shard in progress; each of the `to_decode` clips that have not arrived becomes a row or a failure."""

    encoded: EncodedShard
    to_decode: int


@dataclass(frozen=True)
class _Batch:
    """Clips of one shard that are being encoded together; no clip if the `last` ones of a shard all failed.

    `wait` waits for their rows.
    """

    shard: EncodedShard
    clips: list[PreparedClip]
    last: bool
    wait: Callable[[], EncodedBatch]


Result = PreparedClip | UndecodedClip


class _TimedResults:
    """The decoders' results, and how long the caller waited: for the first result, and for all others."""

    def __init__(self, results: Iterator[Result]) -> None:
        self._results = results
        self.first_s: float | None = None
        self.others_s = 0.0
        self.decode_s = self.failed_s = 0.0

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        started = time.perf_counter()
        result = next(self._results)
        waited = time.perf_counter() - started
        if self.first_s is None:
            self.first_s = waited
        else:
            self.others_s += waited
        if isinstance(result, UndecodedClip):
            self.failed_s += result.seconds
        else:
            self.decode_s += result.seconds
        return result


@dataclass(frozen=True)
class Target:
    """A store to fill.

    Attributes:
        job: The resolved config.
        store: Store that is open for writing.
        works: Shards, with the ids of their missing clips.
    """

    job: ExtractionJob
    store: Store
    works: Sequence[ShardWork]


def encode_shards(
    job: ExtractionJob,
    store: Store,
    works: Sequence[ShardWork],
    clips: Mapping[str, Clip],
    decoders: int,
    on_progress: OnProgress = lambda clips, nbytes: None,
) -> JobStats:
    """Encode `works` into `store`; as `fill_stores` with one target."""
    return fill_stores([Target(job, store, works)], clips, decoders, on_progress)[0]


def fill_stores(
    targets: Sequence[Target],
    clips: Mapping[str, Clip],
    decoders: int,
    on_progress: OnProgress,
) -> list[JobStats]:
    """Encode the shards of each target, with one decode of each clip for all targets that lack it.

    Args:
        targets: The stores; their configs must have the same data, and frames that differ only in size.
        clips: Clip of each id.
        decoders: Number of child processes that decode.
        on_progress: Called with (clips, bytes of their rows as the store keeps them, before compression) after each
            batch.

    Returns:
        Statistics for each target.

    Raises:
        TooManyErrors: Checked after each shard is committed.
        StoreError: A shard cannot be written.
    """
    started = time.perf_counter()
    kinds = list(dict.fromkeys(target.job.frame_kind for target in targets))
    kind_of = [kinds.index(target.job.frame_kind) for target in targets]
    with ExitStack() as stack:
        with ExitStack() as opened:
            encoders = [opened.enter_context(target.job.open_batch_encoder()) for target in targets]
            # Decoding runs ahead by the next batch, and by two tasks for each child: one in progress and one waiting.
            ahead = max(encoder.size for encoder in encoders) + 2 * decoders
            slots = ahead + sum(encoder.held for encoder in encoders)
            pool = stack.enter_context(open_decoders(targets[0].job.config.video, kinds, decoders, slots))
            stack.push(opened.pop_all())  # the encoders end before the decoders, whose memory they use
        fillings = []
        for target, encoder in zip(targets, encoders, strict=True):
            # The writer ends before the encoder, because its rows are in the encoder's memory.
            writer = stack.enter_context(
                BackgroundShardWriter(target.store, target.job.config.engine.max_errors, encoder.slots)
            )
            fillings.append(_Filling(target, encoder, writer, clips, on_progress))
        requested: deque[list[int]] = deque()  # for each clip that is being decoded, the targets that lack it
        results = _TimedResults(pool.map(_merged(fillings, clips, requested), ahead, TOGETHER))
        for result in results:
            raise_dropped_requeue()
            lacking = requested.popleft()
            shares: Sequence[Result] = [result] * len(lacking)
            if len(targets) > 1 and isinstance(result, PreparedClip):
                shares = result.for_encoders([kind_of[number] for number in lacking])
            for number, share in zip(lacking, shares, strict=True):
                fillings[number].add(share)
        for filling in fillings:
            filling.finish()
    total_s = time.perf_counter() - started
    return [filling.stats(total_s, results, decoders) for filling in fillings]


def _merged(fillings: Sequence["_Filling"], clips: Mapping[str, Clip], requested: deque[list[int]]) -> Iterator[Clip]:
    """The clips to decode, in the order of `clips`; the targets that lack one are appended to `requested`.

    A store whose rows are in another order gets its clips in that order, some of which are then decoded once more.
    """
    if len(fillings) == 1:
        for clip in fillings[0].wanted():
            requested.append([0])
            yield clip
        return
    place = {clip_id: number for number, clip_id in enumerate(clips)}
    wanted = [filling.wanted() for filling in fillings]
    upcoming = [next(clips_of_target, None) for clips_of_target in wanted]
    while waiting := [clip for clip in upcoming if clip is not None]:
        first = min(waiting, key=lambda clip: place[clip.clip_id])
        lacking = [number for number, clip in enumerate(upcoming) if clip is not None and clip.clip_id == first.clip_id]
        requested.append(lacking)
        yield first
        for number in lacking:
            upcoming[number] = next(wanted[number], None)


class _Filling:
    """A store that is being filled from clips that arrive in the order in which it `wanted` them."""

    def __init__(
        self,
        target: Target,
        encoder: BatchEncoder,
        writer: BackgroundShardWriter,
        clips: Mapping[str, Clip],
        on_progress: OnProgress,
    ) -> None:
        self._root = target.job.config.data.root
        self._machine = describe_machine(target.job.device)
        self._works = target.works
        self._row_bytes = target.store.row_bytes
        self._encoder = encoder
        self._writer = writer
        self._clips = clips
        self._on_progress = on_progress
        self._leased: deque[_Shard] = deque()
        self._gathered: list[PreparedClip] = []
        self._encoding: _Batch | None = None
        self._cut_short: dict[str, float] = {}

    def wanted(self) -> Iterator[Clip]:
        """The clips to decode, shard by shard; a shard is leased before its first clip."""
        for work, to_encode in self._writer.leases(self._works):
            # Another job may have committed some of them since the work was listed.
            ids = [clip_id for clip_id in work.ids if clip_id in to_encode]
            if ids:
                self._leased.append(_Shard(EncodedShard(work, self._machine), len(ids)))
                yield from (self._clips[clip_id] for clip_id in ids)
            else:
                self._writer.release(work.shard)

    def add(self, result: PreparedClip | UndecodedClip) -> None:
        """Take the next clip; batches end where shards do, so that they do not depend on the shard before."""
        shard = self._leased[0]
        shard.to_decode -= 1
        if isinstance(result, UndecodedClip):
            shard.encoded.failures[result.clip.clip_id] = Failure(result.reason, result.traceback)
        else:
            self._encoder.add(result)
            self._gathered.append(result)
            if result.missing_s > ROUNDING_S:
                self._cut_short[result.clip.clip_id] = result.missing_s
        last = not shard.to_decode
        if last or len(self._gathered) == self._encoder.size:
            # Rows are taken one batch late, so that the encoder computes while the next batch is gathered.
            batch = _Batch(shard.encoded, self._gathered, last, self._encoder.start())
            self._gathered = []
            self._take_rows()
            self._encoding = batch
        if last:
            self._leased.popleft()

    def finish(self) -> None:
        """Wait until all is written."""
        self._take_rows()
        self._writer.wait()

    def stats(self, total_s: float, results: _TimedResults, decoders: int) -> JobStats:
        """Statistics of the target."""
        writer = self._writer
        return JobStats(
            committed=writer.committed,
            quarantined=writer.quarantined,
            skipped=tuple(writer.skipped),
            cut_short=self._cut_short,
            stages=Stages(
                total_s=total_s,
                start_s=results.first_s or 0.0,
                decode_s=results.decode_s,
                wait_decode_s=results.others_s,
                encode_s=self._encoder.seconds,
                write_s=writer.write_s,
                wait_write_s=writer.wait_s,
                decoders_s=(results.decode_s + results.failed_s) / decoders,
                handover_s=self._encoder.handover_s,
                busy_s=self._encoder.busy_s,
            ),
        )

    def _take_rows(self) -> None:
        """Take the rows of the batch that is being encoded, and write its shard if they are the shard's last ones."""
        if self._encoding is None:
            return
        batch, self._encoding = self._encoding, None
        shard, encoded = batch.shard, batch.wait()
        shard.rows.update(encoded.rows)
        shard.finite.update(encoded.finite)
        for clip in batch.clips:
            shard.sources[clip.clip.clip_id] = clip.source
            shard.origins[clip.clip.clip_id] = origin_of(clip.clip, self._root, clip.size)
        # A quantised store gets its patches in float32, and quantises them as it writes.
        rows = len(encoded.rows)
        self._on_progress(rows + (len(shard.failures) if batch.last else 0), rows * self._row_bytes)
        if batch.last:
            self._writer.write(shard)
