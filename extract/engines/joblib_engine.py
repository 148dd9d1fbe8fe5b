"""Worker processes on this machine, by joblib's loky."""

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from typing import Any, TypeVar

from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import Clip
from egopatch.extract.encoders import Network
from egopatch.extract.engines.interrupts import SIGNALS
from egopatch.extract.engines.sharing import WorkersDied, run_worker, worker_count
from egopatch.extract.worker.device import device_of_worker
from egopatch.extract.worker.job_stats import JobStats
from egopatch.features import ShardWork
from egopatch.features.common.parent import exit_with_parent
from egopatch.features.common.signals import children_without_interrupts, start_trackers

Result = TypeVar("Result")


def run_workers(config: Config, network: Network, works: Sequence[ShardWork], clips: Mapping[str, Clip]) -> JobStats:
    """Encode `works` with `engine.workers` processes.

    Raises:
        ConfigError: A registered network holds something that cannot be sent to another process.
        WorkersDied: One of them was killed, which makes loky end the others.
        TooManyErrors, StoreError: As `extract.worker.pipeline.encode_shards`.
    """
    workers = min(worker_count(config), len(works))
    try:
        stats = call_in_workers(
            _run_worker, [(config, network, rank, workers, works, clips) for rank in range(workers)]
        )
    except pickle.PicklingError as error:
        raise ConfigError(
            f"encoder.arch is {network.name!r}, which cannot be sent to worker processes ({error.__cause__ or error});"
            " let its functions hold no open files, locks and the like, or use engine.workers 1"
        ) from error
    except TerminatedWorkerError as error:
        raise WorkersDied from error
    return sum(stats, JobStats())


def call_in_workers(function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Results of `function` for each of `arguments`, each in a process of its own; the first error ends all of them."""
    start_trackers()
    with children_without_interrupts():
        executor = ProcessPoolExecutor(max_workers=len(arguments))
        futures = [executor.submit(function, *args) for args in arguments]
    try:
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        executor.shutdown(kill_workers=True)


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
