"""Worker processes on this machine, by joblib's loky."""

import multiprocessing
import pickle
import signal
from collections.abc import Mapping, Sequence

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import Clip
from egopatch.extract.encoders import Network
from egopatch.extract.engines.interrupts import SIGNALS
from egopatch.extract.engines.sharing import WorkersDied, run_worker, worker_count
from egopatch.extract.worker.device import device_of_worker
from egopatch.extract.worker.job_stats import JobStats
from egopatch.features import ShardWork
from egopatch.features.common.parent import exit_with_parent


def run_workers(config: Config, network: Network, works: Sequence[ShardWork], clips: Mapping[str, Clip]) -> JobStats:
    """Encode `works` with `engine.workers` processes.

    Raises:
        ConfigError: A registered network holds something that cannot be sent to another process.
        WorkersDied: One of them was killed, which makes loky end the others.
        TooManyErrors, StoreError: As `extract.worker.pipeline.encode_shards`.
    """
    workers = min(worker_count(config), len(works))
    task = joblib.delayed(_run_worker)
    try:
        stats = joblib.Parallel(n_jobs=workers, backend="loky")(
            task(config, network, rank, workers, works, clips) for rank in range(workers)
        )
    except pickle.PicklingError as error:
        raise ConfigError(
            f"encoder.arch is {network.name!r}, which cannot be sent to worker processes ({error.__cause__ or error});"
            " let its functions hold no open files, locks and the like, or use engine.workers 1"
        ) from error
    except TerminatedWorkerError as error:
        raise WorkersDied from error
    return sum(stats, JobStats())


def _run_worker(
    config: Config,
    network: Network,
    rank: int,
    workers: int,
    works: Sequence[ShardWork],
    clips: Mapping[str, Clip],
) -> JobStats:
    # The parent handles signals to the whole job: it ends its workers, and they end with it.
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent()
    # loky registers its own start method, which a spawned decoder process would not know.
    multiprocessing.set_start_method("spawn", force=True)
    device = device_of_worker(config.encoder.device, rank)
    return run_worker(config, network, rank, workers, works, clips, device, neighbours=workers)
