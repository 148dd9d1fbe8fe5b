"""Workers on a Ray cluster: one actor each, spread over the nodes.

The store, the checkpoint and the videos must have the same paths on every node (on a shared file system; the store may
also be in object storage). Ray only starts workers and notices when one dies: the ledger lists what a dead worker
committed, and the others take its remaining shards.
"""

import math
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.engines.sharing import SharedJob, WorkersDied, run_worker
from egopatch.extract.worker.job_stats import JobStats
from egopatch.features.common.child_errors import ChildTraceback

COLOUR = re.compile(r"\x1b\[\d*m")  # in Ray's reports
REACH_S = 5.0
POLL_S = 1.0


def run_workers(shared: SharedJob) -> JobStats:
    """Encode the shards of a job on the cluster at `engine.address`.

    Raises:
        ConfigError: Ray is not installed, nothing answers at the address, the cluster is too small, or one of its nodes
            cannot import this program or the network.
        WorkersDied: A worker or its node died, and the others have ended.
        TooManyErrors, StoreError: As `extract.worker.pipeline.encode_shards`.
    """
    with _connected(shared.config.engine.address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers, needs = _fit(shared.config, nodes, len(shared.works))
        used = sum(node.get("CPU", 0) >= 1 for node in nodes)  # a head node is often started without cores
        remote = ray.remote(**needs, scheduling_strategy="SPREAD")(_Worker)
        actors = [remote.remote() for _ in range(workers)]
        job = ray.put(_Job(shared, math.ceil(workers / used), Path.cwd(), sys.path))
        try:
            return _gather(ray, [actor.work.remote(rank, workers, job) for rank, actor in enumerate(actors)])
        finally:
            for actor in actors:
                ray.kill(actor)


@dataclass(frozen=True)
class _Job:
    """The data that every worker receives; `folder` and `path` are the job's working folder and `sys.path`."""

    shared: SharedJob
    neighbours: int
    folder: Path
    path: list[str]


class _Worker:
    def work(self, rank: int, workers: int, job: _Job) -> JobStats:
        """Work in the folder where the job was started, so that relative paths and a script's own modules are found."""
        os.chdir(job.folder)
        sys.path += [place for place in job.path if place not in sys.path]
        return run_worker(job.shared, rank, workers, job.shared.config.encoder.device, job.neighbours)


def _gather(ray: Any, waiting: list[Any]) -> JobStats:
    """Sum of the workers' statistics. A dead worker is reported after the others have finished and taken its shards."""
    stats, died = JobStats(), None
    while waiting:
        # Short waits, so that Python can handle signals in between.
        ready, waiting = ray.wait(waiting, timeout=POLL_S)
        for task in ready:
            try:
                stats += ray.get(task)
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:  # a new worker would fail in the same way
                    reason = str(error).strip().splitlines()[-1]
                    raise ConfigError(
                        f"engine.name is 'ray', but a node of the cluster cannot start a worker ({reason}); install "
                        "egopatch and what it needs on every node, in the same versions as on this machine"
                    ) from error
                died = error
            except ray.exceptions.RayTaskError as error:
                # The worker's own error. Ray's report, with the worker's traceback, is shown if a traceback is printed.
                raise error.cause from ChildTraceback(COLOUR.sub("", str(error)))
    if died is not None:
        raise WorkersDied from died
    return stats


def _fit(config: Config, nodes: Sequence[Mapping[str, float]], shards: int) -> tuple[int, dict[str, float]]:
    """Number of workers, and the resources that Ray reserves for each on one of `nodes`, given by their resources.

    Raises:
        ConfigError: The whole cluster has too few GPUs or cores; Ray itself would wait for them forever.
    """
    requested, device = config.engine.workers, config.encoder.device
    cores = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [min(int(node.get("GPU", 0)), beside) for node, beside in zip(nodes, cores, strict=True)]
    if device.startswith("cuda") and not any(gpus):
        raise ConfigError(
            f"encoder.device is {device!r} but no node of the Ray cluster has both a GPU and a core; use auto or cpu"
        )
    if device.startswith("cuda:"):
        raise ConfigError(f"encoder.device is {device!r} but Ray gives each worker a GPU of its own; use cuda or auto")
    kind, places = ("GPU", gpus) if any(gpus) and device != "cpu" else ("CPU", cores)
    workers = requested if requested != "auto" else sum(gpus) if kind == "GPU" else max(sum(map(bool, cores)), 1)
    if workers > sum(places):
        raise ConfigError(
            f"engine.workers is {requested} but the Ray cluster has {sum(places)} {kind}s, one for each worker; request"
            f" at most {sum(places)}, or add nodes"
        )
    workers = min(workers, shards)
    if kind == "GPU":
        return workers, {"num_gpus": 1.0, "num_cpus": 1.0}
    # As many cores per worker as leave room for all workers: each runs on one node, and nodes differ.
    shares = (share for share in range(max(cores), 0, -1) if sum(count // share for count in cores) >= workers)
    return workers, {"num_cpus": float(next(shares))}


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to `address`; `local` starts a cluster here for the length of the block."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "engine.name is 'ray' but Ray is not installed; pip install 'ray>=2.52', or use engine.name joblib"
        ) from error
    if address != "local":
        _require_answer(address)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"engine.address is {address!r} but Ray cannot work there ({reason}); correct what this names, "
            "or use engine.name joblib"
        ) from error
    finally:  # Ray replaces them
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Check that something listens at `address`; Ray itself would try for a minute, then print a page of text.

    Raises:
        ConfigError: `address` is not host:port, or nothing listens there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"engine.address is {address!r}; expected local, or host:port of a running Ray cluster")
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"engine.address is {address!r} but nothing answers there ({error}); start a cluster with `ray start"
            " --head`, or use local"
        ) from error
