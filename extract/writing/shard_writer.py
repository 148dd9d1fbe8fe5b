"""Leasing and writing shards on separate threads, while the encoder computes."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import TypeVar

from torch import Tensor

from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.errors import JobFailed
from egopatch.extract.writing.commit_processes import CommitProcesses
from egopatch.features import Failure, ShardOwned, ShardWork, Store, StoreError
from egopatch.features.common.machine import usable_cores
from egopatch.features.common.signals import signals_held
from egopatch.features.common.units import counted
from egopatch.features.state.commit import commit_shard
from egopatch.features.state.origin import Origin
from egopatch.features.store.writer import Rows
from egopatch.features.values.encoding import array_not_finite
from egopatch.features.values.errors import NotFinite
from egopatch.features.values.spec import QUANTISED

Work = TypeVar("Work")
Done = TypeVar("Done")


@dataclass(frozen=True)
class EncodedShard:
    """The results for a shard's clips, to which the caller adds until it writes them.

    Attributes:
        work: The shard.
        machine: Machine that computed the rows.
        rows, sources, origins, failures, finite: As `Store.write_shard` takes them.
    """

    work: ShardWork
    machine: str
    rows: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    finite: set[str] = field(default_factory=set)


class TooManyErrors(JobFailed):
    """More clips are in quarantine than `engine.max_errors` allows; committed shards stay."""


def shards_at_once() -> int:
    """Shards that a worker writes at a time: while one is synced and read back, rows of others are checked and written.

    On a node with an H100, four bare threads wrote 1,050 to 1,680 clips/s of 4.8 MB to memory, and one 430 to 520. In
    the pipeline there, two were as fast as four: writing was not the bottleneck.
    """
    return min(4, max(2, usable_cores() // 4))


class BackgroundShardWriter:
    """Leases and writes shards; a context manager, which releases the leases at its end.

    Args:
        store: Store that is open for writing.
        max_errors: Clips that may be in quarantine: a count, or a share of all clips.
        slots: Memory of the rows, if other processes can share it. Child processes then commit the shards of a store in
            a folder, unless its rows are quantised, which is done when they are written.

    Attributes:
        committed, quarantined: Number of clips so far.
        skipped: One line for each shard that another process holds.
        write_s: Seconds during which at least one shard was being written.
        wait_s: Seconds for which the caller waited for writing.
    """

    def __init__(self, store: Store, max_errors: int | float, slots: SharedSlots | None = None) -> None:
        self._store = store
        self._max_errors = max_errors
        self._at_once = shards_at_once()
        quantised = any(array.dtype in QUANTISED for array in store.spec.arrays)
        self._children: CommitProcesses | None = None
        if slots is not None and store.catalog.storage.in_place and not quantised:
            self._children = CommitProcesses(slots, self._at_once, store.format)
        self._leasing = ThreadPoolExecutor(1, thread_name_prefix="leases")
        self._writing = ThreadPoolExecutor(self._at_once, thread_name_prefix="shards")
        self._leases: dict[int, ExitStack] = {}
        self._unfinished: deque[Future[tuple[int, int]]] = deque()
        self._failed: set[str] = set()
        self._counting = threading.Lock()
        self._now_writing, self._writing_since = 0, 0.0
        self.committed = 0
        self.quarantined = 0
        self.skipped: list[str] = []
        self.write_s = 0.0
        self.wait_s = 0.0

    def __enter__(self) -> "BackgroundShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as last:  # if one of these is interrupted, the others still run
            last.callback(self._release_all)
            if self._children:
                last.push(self._children)
            for threads in (self._leasing, self._writing):
                # A write that has begun is finished: completing a commit takes no longer than undoing it.
                last.callback(threads.shutdown, wait=True, cancel_futures=True)

    def leases(self, works: Sequence[ShardWork]) -> Iterator[tuple[ShardWork, tuple[str, ...]]]:
        """Lease each shard in turn; the next one is leased while the caller works on the current one.

        Shards that another job holds are skipped and tried once more at the end, in case that job has died meanwhile.

        Yields:
            The work, and the clips of its shard that are uncommitted or whose row must still be replaced, without
            quarantined clips that the work does not retry.
        """
        held_elsewhere = list(works)
        for _ in range(2):
            works, held_elsewhere = held_elsewhere, []
            self.skipped.clear()
            upcoming = deque(self._begin(self._leasing, self._lease, work) for work in works[:1])
            for work, following in zip_longest(works, works[1:]):
                try:
                    to_encode = upcoming.popleft().result()
                except ShardOwned as error:
                    held_elsewhere.append(work)
                    self.skipped.append(str(error))
                    to_encode = None
                if following:
                    upcoming.append(self._begin(self._leasing, self._lease, following))
                if to_encode is not None:
                    yield work, to_encode

    def release(self, shard: int) -> None:
        """Release a lease without writing."""
        self._begin(self._leasing, self._release, shard)

    def write(self, shard: EncodedShard) -> None:
        """Begin to write a leased shard, and release its lease afterwards. Waits while too many others are unwritten.

        Raises:
            TooManyErrors, StoreError: Raised by an earlier shard.
        """
        self._wait_for(self._at_once - 1)
        self._unfinished.append(self._begin(self._writing, self._write, shard))
        self._failed |= shard.failures.keys()
        if shard.failures and self._too_many(len(self._store.quarantine.keys() | self._failed)):
            self.wait()  # before another shard is begun, which a job over its limit would commit only by chance

    def wait(self) -> None:
        """Wait until all shards are written. Errors as in `write`."""
        self._wait_for(0)

    @staticmethod
    def _begin(threads: ThreadPoolExecutor, work: Callable[[Work], Done], on: Work) -> Future[Done]:
        with signals_held():  # an exception while a thread starts leaves one that is never told to end
            return threads.submit(work, on)

    def _wait_for(self, unfinished: int) -> None:
        """Wait until only so many shards are being written."""
        while len(self._unfinished) > unfinished:
            started = time.perf_counter()
            committed, quarantined = self._unfinished.popleft().result()
            self.wait_s += time.perf_counter() - started
            self.committed += committed
            self.quarantined += quarantined
            self._check_errors()

    def _lease(self, work: ShardWork) -> tuple[str, ...]:
        lease = ExitStack()
        uncommitted = lease.enter_context(self._store.lease(work.shard))
        self._leases[work.shard] = lease
        # Another job may have tried some clips since the work was listed; see `engines.sharing.still_missing`.
        failed = {name for name, record in self._store.quarantine.items() if record.attempts != work.retries.get(name)}
        untried = [name for name in uncommitted if name not in failed]
        return *untried, *self._store.catalog.unchanged(work.replaces)

    def _release(self, shard: int) -> None:
        self._leases.pop(shard).close()

    def _release_all(self) -> None:
        for lease in self._leases.values():
            lease.close()

    def _write(self, shard: EncodedShard) -> tuple[int, int]:
        """Write a shard; returns how many clips were committed, and how many put into quarantine."""
        unstorable: dict[str, Failure] = {}
        with self._timed():
            try:
                self._write_shard(shard)
            except NotFinite:  # found while the shard was written; looking at all rows before would cost another pass
                unstorable = self._unstorable(shard.work.shard, shard.rows)
                if not unstorable:
                    raise
                rows = {name: row for name, row in shard.rows.items() if name not in unstorable}
                # The shard's own failures are in quarantine already, where each record is an attempt.
                self._write_shard(replace(shard, rows=rows, failures=unstorable))
            self._release(shard.work.shard)
        return len(shard.rows) - len(unstorable), len(shard.failures) + len(unstorable)

    def _write_shard(self, shard: EncodedShard) -> None:
        work, machines = shard.work, dict.fromkeys(shard.rows, shard.machine)
        self._store.write_shard(
            work.shard,
            rows=shard.rows,
            sources=shard.sources,
            failures=shard.failures,
            origins=shard.origins,
            replaces=work.replaces,
            machines=machines,
            committer=self._children or commit_shard,
            finite=shard.finite,
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the seconds of the block in `write_s`; seconds in which several threads write count once."""
        with self._counting:
            if not self._now_writing:
                self._writing_since = time.perf_counter()
            self._now_writing += 1
        try:
            yield
        finally:
            with self._counting:
                self._now_writing -= 1
                if not self._now_writing:
                    self.write_s += time.perf_counter() - self._writing_since

    def _unstorable(self, shard: int, rows: Rows) -> dict[str, Failure]:
        """The clips whose tokens hold NaN or infinity.

        Raises:
            StoreError: All clips of the shard do, so they are not the cause; or a text does, which has no quarantine.
        """
        arrays = {name: array for name, row in rows.items() if (array := array_not_finite(row))}
        encoder = self._store.fingerprint.fields.get("arch")
        if arrays and self._store.spec.kind == "text":
            raise StoreError(
                f"{len(arrays)} of {counted(len(rows), 'text')}, such as {min(arrays)!r}, came out with NaN or "
                f"infinity in their states, so none was stored; the text half of the encoder {encoder} is at fault, "
                "or its states exceed store.dtype: check its weights, or use another --store.dtype and --store.path"
            )
        if len(arrays) == len(rows) > 1:
            raise StoreError(
                f"all {len(rows)} clips of shard {shard} of {self._store.path} have NaN or infinity in their tokens, "
                f"so none was stored; the encoder {encoder} or its arithmetic is at fault, or its tokens exceed "
                "store.dtype: check encoder.checkpoint, or use --encoder.dtype float32 or another --store.dtype, and "
                "another --store.path"
            )
        return {
            name: Failure(
                f"{array} of its tokens holds NaN or infinity, while other clips of its shard are fine; look at its "
                "frames (egopatch extract frames), or encode all clips in float32 (encoder.dtype) into another store"
            )
            for name, array in arrays.items()
        }

    def _too_many(self, quarantined: int) -> bool:
        limit = self._max_errors
        share = isinstance(limit, float) and limit < 1
        return quarantined > (limit * len(self._store.catalog.rows) if share else limit)

    def _check_errors(self) -> None:
        bad = self._store.quarantine
        if self._too_many(len(bad)):
            clip_id, record = next(iter(bad.items()))
            raise TooManyErrors(
                f"clips in quarantine: {len(bad)}, engine.max_errors allows {self._max_errors:g}; the first is"
                f" {clip_id}: {record.reason}"
            )
