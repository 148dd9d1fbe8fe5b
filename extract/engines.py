"""Who runs the workers. The unit is a shard; correctness comes from ledger and leases, never from the engine."""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from configs.schema import Config
from extract.datasets import Clip
from extract.encoders import VideoEncoder, open_checkpoint
from extract.interrupts import SIGNALS, start_trackers
from extract.pipeline import encode_shards
from extract.tally import Tally
from extract.worker import load_encoder
from features import ShardWork, Store, open_store

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
    """Encode `works` with `engine.workers` workers; arguments and errors as in `extract.pipeline.encode_shards`.

    Raises:
        WorkersKilled: as often as they were started again, too.
    """
    workers = min(worker_count(config), len(works))
    if workers == 1:
        return encode_shards(config, encoder, store, works, clips, decoder_count(config, 1), on_progress)
    tally = Tally()
    for _ in range(1 + RESTARTS):
        try:
            with _progress_from_ledger(store, on_progress):
                tally += _run_workers(config, works, clips, workers)
            store.refresh()
            return tally
        except TerminatedWorkerError:  # loky ends the others with it; the leases of all of them have lapsed
            store.refresh()
            left = set(store.missing())
            done = [clip_id for work in works for clip_id in work.ids if clip_id not in left]
            bad = store.quarantine.keys() & done
            tally += Tally(len(done) - len(bad), len(bad))
            works = [ShardWork(work.shard, ids) for work in works if (ids := tuple(i for i in work.ids if i in left))]
            if not works:
                return tally
    raise WorkersKilled(
        f"workers were killed {1 + RESTARTS} times, perhaps for their memory: ask for more, or set a smaller"
        " encoder.batch or engine.workers"
    )


def _run_workers(config: Config, works: Sequence[ShardWork], clips: Mapping[str, Clip], workers: int) -> Tally:
    decoders = decoder_count(config, workers)
    tasks = [
        joblib.delayed(_worker)(config, rank, works[rank::workers], _clips_of(works[rank::workers], clips), decoders)
        for rank in range(workers)
    ]
    return sum(joblib.Parallel(n_jobs=workers, backend="loky")(tasks), Tally())


def worker_count(config: Config) -> int:
    """`auto` is one worker a GPU, or one on a machine without."""
    if config.engine.workers == "auto":
        return max(torch.cuda.device_count(), 1)
    return config.engine.workers


def decoder_count(config: Config, workers: int) -> int:
    """`auto` shares the cores between the workers, at most 8 each."""
    if config.engine.decoders == "auto":
        return max(min((os.cpu_count() or 1) // workers, 8), 1)
    return config.engine.decoders


def _clips_of(works: Sequence[ShardWork], clips: Mapping[str, Clip]) -> dict[str, Clip]:
    return {clip_id: clips[clip_id] for work in works for clip_id in work.ids}


def _worker(config: Config, rank: int, works: Sequence[ShardWork], clips: Mapping[str, Clip], decoders: int) -> Tally:
    # A signal to the whole job is the parent's to handle: it ends its workers, and they end with it.
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    start_trackers()
    # loky names itself the start method, which a spawned decoder child could not find.
    multiprocessing.set_start_method("spawn", force=True)
    # One GPU each, round and round where there are more workers than GPUs.
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else None
    encoder = load_encoder(config, open_checkpoint(config.encoder.arch, config.encoder.checkpoint), device)
    store = open_store(config.store.path)
    return encode_shards(config, encoder, store, works, clips, decoders, lambda clips, nbytes: None)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


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
