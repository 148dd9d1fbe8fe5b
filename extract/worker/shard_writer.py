"""Leasing and writing shards on a separate thread, while the encoder computes."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest

from egopatch.features import Failure, ShardOwned, ShardWork, Store, StoreError
from egopatch.features.state.origin import Origin
from egopatch.features.store.writer import Rows
from egopatch.features.values.encoding import array_not_finite
from egopatch.features.values.errors import NotFinite


class TooManyErrors(RuntimeError):
    """More clips are in quarantine than `engine.max_errors` allows; committed shards stay."""


class ShardWriter:
    """Leases and writes shards; a context manager, which releases the leases at its end.

    One thread makes all calls to the store, in order, because two threads must not write to the same store.

    Args:
        store: Store that is open for writing.
        max_errors: Clips that may be in quarantine: a count, or a share of all clips.

    Attributes:
        committed, quarantined: Number of clips so far.
        skipped: One line for each shard that another process holds.
        write_s: Seconds spent on writing.
        wait_s: Seconds for which the caller waited for writing.
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
        # A write that has begun is finished: completing a commit takes no longer than undoing it.
        self._thread.shutdown(wait=True, cancel_futures=True)
        for lease in self._leases.values():
            lease.close()

    def leases(self, works: Sequence[ShardWork]) -> Iterator[tuple[ShardWork, tuple[str, ...]]]:
        """Lease each shard in turn; the next one is leased while the caller works on the current one.

        Shards that another job holds are skipped and tried once more at the end, in case that job has died meanwhile.

        Yields:
            The work, and the clips of its shard that are uncommitted or have a row that is still to be replaced.
        """
        held_elsewhere = list(works)
        for _ in range(2):
            works, held_elsewhere = held_elsewhere, []
            self.skipped.clear()
            upcoming = deque(self._thread.submit(self._lease, work) for work in works[:1])
            for work, following in zip_longest(works, works[1:]):
                try:
                    to_encode = upcoming.popleft().result()
                except ShardOwned as error:
                    held_elsewhere.append(work)
                    self.skipped.append(str(error))
                    to_encode = None
                if following:
                    upcoming.append(self._thread.submit(self._lease, following))
                if to_encode is not None:
                    yield work, to_encode

    def release(self, shard: int) -> None:
        """Release a lease without writing."""
        self._thread.submit(self._release, shard)

    def write(
        self,
        work: ShardWork,
        rows: Rows,
        sources: Mapping[str, str],
        failures: Mapping[str, Failure],
        origins: Mapping[str, Origin],
        machine: str,
    ) -> None:
        """Begin to write a leased shard, whose lease is released afterwards. Waits for the previous shard.

        Raises:
            TooManyErrors, StoreError: Raised by the previous shard.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, work, rows, sources, failures, origins, machine)

    def wait(self) -> None:
        """Wait until the shard in progress is written. Errors as in `write`."""
        if self._writing:
            started = time.perf_counter()
            self._writing.result()
            self.wait_s += time.perf_counter() - started

    def _lease(self, work: ShardWork) -> tuple[str, ...]:
        lease = ExitStack()
        uncommitted = lease.enter_context(self._store.lease(work.shard))
        self._leases[work.shard] = lease
        return *uncommitted, *self._store.catalog.unchanged(work.replaces)

    def _release(self, shard: int) -> None:
        self._leases.pop(shard).close()

    def _write(
        self,
        work: ShardWork,
        rows: Rows,
        sources: Mapping[str, str],
        failures: Mapping[str, Failure],
        origins: Mapping[str, Origin],
        machine: str,
    ) -> None:
        started = time.perf_counter()

        def write(rows: Rows, failures: Mapping[str, Failure]) -> None:
            machines = dict.fromkeys(rows, machine)
            self._store.write_shard(work.shard, rows, sources, failures, origins, work.replaces, machines)

        try:
            write(rows, failures)
        except NotFinite:  # found while the shard was written; looking at all rows before would cost a pass over them
            unstorable = self._unstorable(work.shard, rows)
            if not unstorable:
                raise
            rows = {name: row for name, row in rows.items() if name not in unstorable}
            failures = {**failures, **unstorable}
            write(rows, failures)
        self._release(work.shard)
        self.write_s += time.perf_counter() - started
        self.committed += len(rows)
        self.quarantined += len(failures)
        self._check_errors()

    def _unstorable(self, shard: int, rows: Rows) -> dict[str, Failure]:
        """The clips whose tokens hold NaN or infinity.

        Raises:
            StoreError: All clips of the shard do: the clips are not the cause.
        """
        if self._store.spec.kind != "patches":
            return {}  # a question has no quarantine; the store refuses it by name
        arrays = {name: array for name, row in rows.items() if (array := array_not_finite(row))}
        if len(arrays) == len(rows) > 1:
            raise StoreError(
                f"all {len(rows)} clips of shard {shard} of {self._store.path} have NaN or infinity in their tokens, "
                "so the encoder or its arithmetic is at fault, and none is stored: check encoder.checkpoint, or use "
                "--encoder.dtype float32 and another --store.path"
            )
        return {
            name: Failure(
                f"{array} of its tokens holds NaN or infinity, as those of other clips do not; look at its frames "
                "(python -m extract frames), or encode all clips in float32 (encoder.dtype) into another store"
            )
            for name, array in arrays.items()
        }

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
