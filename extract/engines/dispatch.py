"""Who runs the workers. The unit is a shard; correctness comes from ledger and leases, never from the engine."""

import dataclasses
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip
from egopatch.extract.encoders import VideoEncoder
from egopatch.extract.engines.sharing import WorkersDied, decoder_count, still_missing, worker_count
from egopatch.extract.worker.job_stats import Tally
from egopatch.extract.worker.pipeline import encode_shards
from egopatch.features import ShardWork, Store, open_store

POLL_S = 2.0
RESTARTS = 3


class WorkersKilled(RuntimeError):
    """Workers were killed again and again; what was committed stays."""


@dataclass(frozen=True)
class Part:
    """One of `count` jobs on a store, which does every `count`-th shard. Which ones never depends on what is done."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """`i/N`, counted from 0.

        Raises:
            ValueError: it is not that.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not match or int(match[1]) >= int(match[2]):
            raise ValueError(f"--shard is {text!r}; expected i/N with 0 <= i < N, such as 0/4 for the first of four")
        return cls(int(match[1]), int(match[2]))

    def of(self, works: Sequence[ShardWork]) -> list[ShardWork]:
        """The shards among `works` that are this job's."""
        return [work for work in works if work.shard % self.count == self.index]


WHOLE = Part()


def encode_with_engine(
    config: Config,
    encoder: VideoEncoder,
    store: Store,
    works: Sequence[ShardWork],
    clips: Mapping[str, Clip],
    on_progress: Callable[[int, int], None],
) -> Tally:
    """Encode `works` with `engine.workers` workers; arguments and errors as in `extract.worker.pipeline.encode_shards`.

    Raises:
        ConfigError: the engine is not installed, or cannot have as many workers.
        WorkersKilled: as often as they were started again, too.
    """
    if config.engine.name == "joblib" and min(worker_count(config), len(works)) == 1:
        return encode_shards(config, encoder, store, works, clips, decoder_count(config, 1), on_progress)
    if config.engine.name == "joblib":
        from egopatch.extract.engines.joblib_engine import run_workers
    else:
        from egopatch.extract.engines.ray_engine import run_workers
    tally = Tally()
    for _ in range(1 + RESTARTS):
        try:
            with _progress_from_ledger(store, on_progress):
                tally += run_workers(config, works, clips)
            store.refresh()
            # A shard that one worker left to its owner may have been finished by that owner, or by a third one.
            return tally if still_missing(works, store) else dataclasses.replace(tally, skipped=())
        except WorkersDied:  # what they did is in the ledger; their leases have lapsed
            store.refresh()
            left = still_missing(works, store)
            missing = {clip_id for work in left for clip_id in work.ids}
            done = [clip_id for work in works for clip_id in work.ids if clip_id not in missing]
            bad = store.quarantine.keys() & done
            tally += Tally(len(done) - len(bad), len(bad))
            works = left
            if not works:
                return tally
    raise WorkersKilled(
        f"workers were killed {1 + RESTARTS} times, perhaps for their memory: ask for more, or set a smaller"
        " encoder.batch or engine.workers"
    )


class _progress_from_ledger:
    """Reports what workers commit, read from the ledger, since their own calls do not reach this process."""

    def __init__(self, store: Store, on_progress: Callable[[int, int], None]) -> None:
        self._store = open_store(store.path)
        self._report = on_progress
        self._stop = threading.Event()
        self._seen = len(store.clip_ids)
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
            self._store.refresh()
            committed = len(self._store.clip_ids)
            self._report(committed - self._seen, 0)
            self._seen = committed
