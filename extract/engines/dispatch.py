"""Runs the workers: in this process, by joblib or by Ray. Ledger and leases ensure correctness whichever runs them."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from egopatch.extract.datasets import Clip
from egopatch.extract.engines.sharing import (
    SharedJob,
    WorkersDied,
    pack_network,
    still_missing,
    worker_count,
)
from egopatch.extract.errors import JobFailed
from egopatch.extract.feed.pool import decoder_count
from egopatch.extract.worker.job import ExtractionJob
from egopatch.extract.worker.job_stats import JobStats
from egopatch.extract.worker.pipeline import OnProgress, encode_shards
from egopatch.features import ShardWork, Store, StoreError, open_store

POLL_S = 2.0
RESTARTS = 3


class WorkersKilled(JobFailed):
    """Workers were killed again after every restart; committed shards stay."""


def encode_with_engine(
    job: ExtractionJob,
    store: Store,
    works: Sequence[ShardWork],
    clips: Mapping[str, Clip],
    on_progress: OnProgress,
) -> JobStats:
    """Encode `works` with `engine.workers` workers; arguments and errors as in `extract.worker.pipeline.encode_shards`.

    Raises:
        ConfigError: The engine is not installed, or cannot start that many workers; or the network cannot be sent to
            them.
        WorkersKilled: Workers were killed, and killed again after every restart.
    """
    config = job.config
    if config.engine.name == "joblib" and worker_count(config) == 1:
        return encode_shards(job, store, works, clips, decoder_count(config, 1), on_progress)
    # Imported here to save start-up time: each engine's library takes a second or more.
    if config.engine.name == "joblib":
        from egopatch.extract.engines.joblib_engine import run_workers
    else:
        from egopatch.extract.engines.ray_engine import run_workers
    packed_network = pack_network(job.network)
    job.encoder.to("meta")  # the workers load their own encoders, and this process needs none
    stats = JobStats()
    for _ in range(1 + RESTARTS):
        try:
            with _LedgerProgress(store, on_progress):
                stats += run_workers(SharedJob(config, packed_network, works, clips))
            store.catalog.refresh()
            # A shard that one worker skipped may have been finished by its holder, or by a third worker.
            return stats if still_missing(works, store) else dataclasses.replace(stats, skipped=())
        except WorkersDied:  # the ledger lists what the workers committed; their leases have expired
            store.catalog.refresh()
            left = still_missing(works, store)
            missing = {clip_id for work in left for clip_id in work.ids}
            done = [clip_id for work in works for clip_id in work.ids if clip_id not in missing]
            bad = store.quarantine.keys() & done
            committed = len(done) - len(bad)
            stats += JobStats(committed, len(bad), untimed=committed)
            works = left
            if not works:
                return stats
    raise WorkersKilled(
        f"workers were killed {1 + RESTARTS} times, perhaps for using too much memory: request more memory, or set a"
        " smaller encoder.batch or engine.workers"
    )


class _LedgerProgress:
    """Reports what workers commit, read from the ledger, because their own calls do not reach this process."""

    def __init__(self, store: Store, on_progress: OnProgress) -> None:
        self._store = open_store(store.path)
        self._report = on_progress
        self._stop = threading.Event()
        self._seen = self._committed()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(POLL_S)
            with suppress(StoreError, OSError):  # the workers report an error that lasts
                self._store.catalog.refresh()
            committed = self._committed()
            self._report(committed - self._seen, 0)
            self._seen = committed

    def _committed(self) -> int:
        return len(self._store.catalog.ledger.clips)  # `clip_ids` would go through all rows
