"""Who runs the workers. The unit is a shard; correctness comes from ledger and leases, never from the engine."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence

import joblib
import torch

from configs.schema import Config
from extract.datasets import Clip
from extract.encoders import VideoEncoder, open_checkpoint
from extract.worker import Tally, encode_shards, load_encoder
from features import ShardWork, Store, open_store

POLL_S = 2.0


def encode_with_engine(
    config: Config,
    encoder: VideoEncoder,
    store: Store,
    works: Sequence[ShardWork],
    clips: Mapping[str, Clip],
    on_progress: Callable[[int, int], None],
) -> Tally:
    """Encode `works` with `engine.workers` workers; arguments as in `extract.worker.encode_shards`."""
    workers = min(worker_count(config), len(works))
    decoders = decoder_count(config, workers)
    if workers == 1:
        return encode_shards(config, encoder, store, works, clips, decoders, on_progress)
    tasks = [
        joblib.delayed(_worker)(config, rank, works[rank::workers], _clips_of(works[rank::workers], clips), decoders)
        for rank in range(workers)
    ]
    with _progress_from_ledger(store, on_progress):
        tally = sum(joblib.Parallel(n_jobs=workers, backend="loky")(tasks), Tally())
    store.refresh()
    return tally


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
    # loky names itself the start method, which a spawned decoder child could not find.
    multiprocessing.set_start_method("spawn", force=True)
    # One GPU each, round and round where there are more workers than GPUs.
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else None
    encoder = load_encoder(config, open_checkpoint(config.encoder.arch, config.encoder.checkpoint), device)
    store = open_store(config.store.path)
    return encode_shards(config, encoder, store, works, clips, decoders, lambda clips, nbytes: None)


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
