"""Worker processes on this machine, by joblib's loky."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed, wait
from contextlib import suppress
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

from egopatch.extract.children.spawned import require_importable_program, require_semaphores
from egopatch.extract.engines.sharing import SharedJob, WorkersDied, run_worker, worker_count
from egopatch.extract.worker.device import device_of_worker
from egopatch.extract.worker.job_stats import JobStats
from egopatch.features.common.parent import exit_with_parent
from egopatch.features.common.signals import (
    SCHEDULER_SIGNALS,
    blocked_in_children,
    raise_dropped_requeue,
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

    They get SIGTERM, and are killed if they have not ended after `ENDING_S` seconds, or at once if none has begun.

    Raises:
        ChildProcessError: No process can be started.
    """
    require_importable_program("encoding in worker processes")
    require_semaphores("encoding in worker processes")
    start_trackers()
    begun = multiprocessing.get_context("spawn").Event()  # by any worker
    executor = ProcessPoolExecutor(len(arguments), initializer=_start_worker, initargs=(begun,))
    futures: list[Future[Result]] = []
    try:
        # A signal in between would leave workers behind, and this process would wait for them when it ends.
        with signals_held(), blocked_in_children(signal.SIGINT, *SCHEDULER_SIGNALS):
            futures = [executor.submit(_in_worker, function, args) for args in arguments]
        for future in as_completed(futures):
            future.result()
        return [future.result() for future in futures]
    finally:
        try:
            if not all(future.done() for future in futures):
                number = signal.SIGTERM if begun.is_set() else signal.SIGKILL
                for process in tuple(executor._processes.values()):
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, number)
                wait(futures, ENDING_S)
        finally:
            executor.shutdown(kill_workers=True)


def _run_worker(shared: SharedJob, rank: int, workers: int) -> JobStats:
    device = device_of_worker(shared.config.encoder.device, rank)  # it may start CUDA, which takes seconds
    return run_worker(shared, rank, workers, device, neighbours=workers)


def _start_worker(begun: Event) -> None:
    """Prepare a worker for its calls. No signal may end it: loky would kill the others in the middle of a commit."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The parent sends SIGTERM whichever signal it got. If it came during the imports, SIG_IGN would drop it here.
    signal.signal(signal.SIGTERM, lambda *_: None)
    exit_with_parent()
    # loky registers its own start method, which a spawned decoder process would not know.
    multiprocessing.set_start_method("spawn", force=True)
    begun.set()


def _in_worker(function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    """Call `function` in a worker, where SIGTERM raises `Requeue`, even if it came before the call."""
    raise_dropped_requeue()  # if an earlier call was told to end, this one is for a worker that was still importing
    with requeue_on_signals():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SCHEDULER_SIGNALS)
        return function(*args)
