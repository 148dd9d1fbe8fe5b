"""Worker processes on this machine, by joblib's loky."""

import multiprocessing
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from types import FrameType
from typing import Any, TypeVar

from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip
from egopatch.extract.engines.interrupts import SIGNALS
from egopatch.extract.engines.sharing import WorkersDied, run_worker, worker_count
from egopatch.extract.worker.device import device_of_worker
from egopatch.extract.worker.job_stats import JobStats
from egopatch.features import ShardWork
from egopatch.features.common.parent import exit_with_parent
from egopatch.features.common.signals import children_without_interrupts, signals_held, start_trackers

Result = TypeVar("Result")


def run_workers(
    config: Config, packed_network: bytes, works: Sequence[ShardWork], clips: Mapping[str, Clip]
) -> JobStats:
    """Encode `works` with `engine.workers` processes; the network is packed by `sharing.pack_network`.

    Raises:
        ConfigError: As `sharing.run_worker`.
        WorkersDied: One of them was killed, which makes loky end the others.
        TooManyErrors, StoreError: As `extract.worker.pipeline.encode_shards`.
    """
    workers = min(worker_count(config), len(works))
    try:
        stats = call_in_workers(
            _run_worker, [(config, packed_network, rank, workers, works, clips) for rank in range(workers)]
        )
    except TerminatedWorkerError as error:
        raise WorkersDied from error
    return sum(stats, JobStats())


def call_in_workers(function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Results of `function` for each of `arguments`, each in a process of its own; the first error ends all of them."""
    start_trackers()
    executor = ProcessPoolExecutor(max_workers=len(arguments))
    try:
        # A signal that came in between would leave workers that this process waits for when it ends.
        with signals_held(), children_without_interrupts():
            futures = [executor.submit(function, *args) for args in arguments]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        executor.shutdown(kill_workers=True)


def _run_worker(
    config: Config,
    packed_network: bytes,
    rank: int,
    workers: int,
    works: Sequence[ShardWork],
    clips: Mapping[str, Clip],
) -> JobStats:
    # The parent handles signals to the whole job: it ends its workers, and they end with it.
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    # Not ignored, because this worker's children would inherit that, and could not be stopped while they start.
    signal.signal(signal.SIGTERM, _ignore)
    exit_with_parent()
    # loky registers its own start method, which a spawned decoder process would not know.
    multiprocessing.set_start_method("spawn", force=True)
    device = device_of_worker(config.encoder.device, rank)
    return run_worker(config, packed_network, rank, workers, works, clips, device, neighbours=workers)


def _ignore(_: int, __: FrameType | None) -> None:
    """Take a signal, and do nothing."""
