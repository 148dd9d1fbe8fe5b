"""One worker's use of a store, on a thread of its own beside the encoder's."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest

from torch import Tensor

from egopatch.features import Failure, ShardOwned, ShardWork, Store


class TooManyErrors(RuntimeError):
    """More clips are in quarantine than `engine.max_errors` allows; what was committed stays."""


class ShardWriter:
    """Leases and writes shards; use it as a context manager, which gives the leases back.

    All calls to the store are made on one thread, in order, since a store is not to be written to from two.

    Args:
        store: open for writing.
        max_errors: clips that may be in quarantine: a count, or a share of all clips.

    Attributes:
        committed, quarantined: clips so far.
        skipped: shards that others own, one line each.
        write_s: seconds spent on writing.
        wait_s: seconds for which the caller had to wait for it.
    """

    def __init__(self, store: Store, max_errors: int | float) -> None:
        self._store = store
        self._max_errors = max_errors
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._leases: dict[int, ExitStack] = {}
        self._writing: Future[None] | None = None
        self.committed = 0
        self.quarantined = 0
        self.skipped: list[str] = []
        self.write_s = 0.0
        self.wait_s = 0.0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        # A write that has begun is finished: a commit takes no longer than its undoing.
        self._thread.shutdown(wait=True, cancel_futures=True)
        for held in self._leases.values():
            held.close()

    def leases(self, works: Sequence[ShardWork]) -> Iterator[tuple[ShardWork, tuple[str, ...]]]:
        """Lease each shard in turn, the next one while the caller is busy with this one.

        What another job owns is passed over, and tried once more at the end: that job may have died meanwhile.

        Yields:
            The work, and what nobody has committed by now of its shard.
        """
        passed = list(works)
        for _ in range(2):
            works, passed = passed, []
            self.skipped.clear()
            upcoming = deque(self._thread.submit(self._lease, work.shard) for work in works[:1])
            for work, following in zip_longest(works, works[1:]):
                try:
                    uncommitted = upcoming.popleft().result()
                except ShardOwned as owned:
                    passed.append(work)
                    self.skipped.append(str(owned))
                    uncommitted = None
                if following:
                    upcoming.append(self._thread.submit(self._lease, following.shard))
                if uncommitted is not None:
                    yield work, uncommitted

    def release(self, shard: int) -> None:
        """Give a lease back without writing."""
        self._thread.submit(self._release, shard)

    def write(
        self,
        shard: int,
        rows: Mapping[str, Mapping[str, Tensor]],
        sources: Mapping[str, str],
        failures: Mapping[str, Failure],
    ) -> None:
        """Begin to write a leased shard, and give its lease back then. Waits for the shard before it.

        Raises:
            TooManyErrors, StoreError: of the shard before.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, shard, rows, sources, failures)

    def wait(self) -> None:
        """Until what was begun is written. Errors as in `write`."""
        if self._writing:
            started = time.perf_counter()
            self._writing.result()
            self.wait_s += time.perf_counter() - started

    def _lease(self, shard: int) -> tuple[str, ...]:
        held = ExitStack()
        uncommitted = held.enter_context(self._store.lease(shard))
        self._leases[shard] = held
        return uncommitted

    def _release(self, shard: int) -> None:
        self._leases.pop(shard).close()

    def _write(
        self,
        shard: int,
        rows: Mapping[str, Mapping[str, Tensor]],
        sources: Mapping[str, str],
        failures: Mapping[str, Failure],
    ) -> None:
        started = time.perf_counter()
        self._store.write_shard(shard, rows, sources, failures)
        self._release(shard)
        self.write_s += time.perf_counter() - started
        self.committed += len(rows)
        self.quarantined += len(failures)
        self._check_errors()

    def _check_errors(self) -> None:
        limit = self._max_errors
        share = isinstance(limit, float) and limit < 1
        bad = self._store.quarantine
        if len(bad) > (limit * len(self._store.planned_ids) if share else limit):
            clip_id, record = next(iter(bad.items()))
            raise TooManyErrors(
                f"clips in quarantine: {len(bad)}, engine.max_errors allows {limit:g}; the first is {clip_id}:"
                f" {record.reason}"
            )
