"""Worker processes on this machine, by joblib's loky."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip
from egopatch.extract.engines.interrupts import SIGNALS
from egopatch.extract.engines.sharing import WorkersDied, decoder_count, run_worker, worker_count
from egopatch.extract.worker.job_stats import JobStats
from egopatch.features import ShardWork

LOOK_S = 2.0


def run_workers(config: Config, works: Sequence[ShardWork], clips: Mapping[str, Clip]) -> JobStats:
    """Encode `works` with `engine.workers` processes.

    Raises:
        WorkersDied: One of them was killed, which makes loky end the others.
        TooManyErrors, StoreError: As `extract.worker.pipeline.encode_shards`.
    """
    workers = min(worker_count(config), len(works))
    decoders = decoder_count(config, workers)
    task = joblib.delayed(_run_worker)
    try:
        stats = joblib.Parallel(n_jobs=workers, backend="loky")(
            task(config, rank, workers, works, clips, decoders) for rank in range(workers)
        )
    except TerminatedWorkerError as error:
        raise WorkersDied from error
    return sum(stats, JobStats())


def _run_worker(
    config: Config, rank: int, workers: int, works: Sequence[ShardWork], clips: Mapping[str, Clip], decoders: int
) -> JobStats:
    # The parent handles signals to the whole job: it ends its workers, and they end with it.
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # loky registers its own start method, which a spawned decoder process would not know.
    multiprocessing.set_start_method("spawn", force=True)
    # One GPU for each worker, taken in turn if there are more workers than GPUs.
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else None
    return run_worker(config, rank, workers, works, clips, decoders, device)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
