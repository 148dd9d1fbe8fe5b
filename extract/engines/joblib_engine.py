"""Worker processes on this machine, by joblib's loky."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed, wait
from typing import Any, TypeVar

from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

from egopatch.extract.children.spawned import require_importable_program, require_semaphores
from egopatch.extract.engines.sharing import SharedJob, WorkersDied, run_worker, worker_count
from egopatch.extract.worker.device import device_of_worker
from egopatch.extract.worker.job_stats import JobStats
from egopatch.features.common.parent import exit_with_parent
from egopatch.features.common.signals import (
    SCHEDULER_SIGNALS,
    children_without_interrupts,
    requeue_on_signals,
    signals_held,
    start_trackers,
)

Result = TypeVar("Result")
ENDING_S = 20.0  # for workers to finish what they are committing; schedulers kill a job after half a minute


def run_workers(shared: SharedJob) -> JobStats:
    """Encode the shards of a job with `engine.workers` processes.

    Raises:
        ConfigError: As `sharing.run_worker`.
        WorkersDied: A worker was killed, which makes loky end the others.
        TooManyErrors, StoreError: As `extract.worker.pipeline.encode_shards`.
    """
    workers = min(worker_count(shared.config), len(shared.works))
    try:
        stats = call_in_workers(_run_worker, [(shared, rank, workers) for rank in range(workers)])
    except TerminatedWorkerError as error:
        raise WorkersDied from error
    return sum(stats, JobStats())


def call_in_workers(function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Results of `function` for each of `arguments`, each in its own process; the first error ends all processes.

    They get SIGTERM, and are killed if they have not ended after `ENDING_S` seconds.

    Raises:
        ChildProcessError: No process can be started.
    """
    require_importable_program("encoding in worker processes")
    require_semaphores("encoding in worker processes")
    start_trackers()
    executor = ProcessPoolExecutor(max_workers=len(arguments))
    futures: list[Future[Result]] = []
    try:
        # A signal in between would leave workers behind, and this process would wait for them when it ends.
        with signals_held(), children_without_interrupts():
            futures = [executor.submit(function, *args) for args in arguments]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        try:
            if not all(future.done() for future in futures):
                for process in tuple(executor._processes.values()):
                    process.terminate()
                wait(futures, ENDING_S)
        finally:
            executor.shutdown(kill_workers=True)


def _run_worker(shared: SharedJob, rank: int, workers: int) -> JobStats:
    # SIGTERM must not end an idle worker either: loky would then kill the others in the middle of a commit.
    for number in (signal.SIGINT, *SCHEDULER_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    exit_with_parent()
    # loky registers its own start method, which a spawned decoder process would not know.
    multiprocessing.set_start_method("spawn", force=True)
    start_trackers()
    with requeue_on_signals():
        device = device_of_worker(shared.config.encoder.device, rank)  # it may start CUDA, which takes seconds
        return run_worker(shared, rank, workers, device, neighbours=workers)
