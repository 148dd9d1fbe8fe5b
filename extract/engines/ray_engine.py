"""Workers on a Ray cluster: one actor each, spread over the nodes.

The store, the checkpoint and the videos have to be at the same paths on every node (a shared file system, or an object
store for the store). Ray only starts workers and notices that they are gone: what a dead one did is in the ledger, and
what it did not do is taken by the others.
"""

import math
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import Clip
from egopatch.extract.engines.sharing import WorkersDied, decoder_count, share_work
from egopatch.extract.worker.job_stats import Tally
from egopatch.features import ShardWork

REACH_S = 5.0
POLL_S = 1.0


def run_workers(config: Config, works: Sequence[ShardWork], clips: Mapping[str, Clip]) -> Tally:
    """Encode `works` on the cluster at `engine.address`.

    Raises:
        ConfigError: Ray is not installed, nothing answers at the address, or the cluster is too small.
        WorkersDied: a worker or its node is gone, and the others have ended.
        TooManyErrors, StoreError: as `extract.worker.pipeline.encode_shards`.
    """
    with _connected(config.engine.address) as ray:
        nodes = sum(node["Alive"] for node in ray.nodes())
        workers, needs = _fit(config, ray.cluster_resources(), nodes, len(works))
        actor = ray.remote(**needs, scheduling_strategy="SPREAD")(_Worker)
        actors = [actor.remote(str(Path.cwd())) for _ in range(workers)]
        shared = ray.put((config, list(works), dict(clips), decoder_count(config, math.ceil(workers / nodes))))
        try:
            return _gather(ray, [one.work.remote(rank, workers, shared) for rank, one in enumerate(actors)])
        finally:
            for one in actors:
                ray.kill(one)


class _Worker:
    """Works where the job was started, so that its relative paths hold."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)

    def work(self, rank: int, workers: int, shared: tuple[Config, list[ShardWork], dict[str, Clip], int]) -> Tally:
        config, works, clips, decoders = shared
        return share_work(config, rank, workers, works, clips, decoders)


def _gather(ray: Any, waiting: list[Any]) -> Tally:
    """The sum of what the workers did. A dead one is reported when all others are through: they take its shards."""
    tally, died = Tally(), None
    while waiting:
        # Short waits, so that signals are heard.
        ready, waiting = ray.wait(waiting, timeout=POLL_S)
        for one in ready:
            try:
                tally += ray.get(one)
            except ray.exceptions.RayActorError as error:
                died = error
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # as the worker raised it, without Ray's account of the way
    if died is not None:
        raise WorkersDied from died
    return tally


def _fit(config: Config, resources: Mapping[str, float], nodes: int, shards: int) -> tuple[int, dict[str, float]]:
    """How many workers, and what Ray reserves for each.

    Raises:
        ConfigError: there is not so much in the whole cluster. Ray itself would wait for it for ever.
    """
    wanted, device, gpus = config.engine.workers, config.encoder.device, resources.get("GPU", 0)
    if device.startswith("cuda") and not gpus:
        raise ConfigError(f"encoder.device is {device!r} but the Ray cluster has no GPU; use auto or cpu")
    kind, there = ("GPU", gpus) if gpus and device != "cpu" else ("CPU", resources.get("CPU", 0))
    workers = wanted if wanted != "auto" else int(gpus) if kind == "GPU" else nodes
    if workers > there:
        raise ConfigError(
            f"engine.workers is {workers} but the Ray cluster has {there:g} {kind}s, one for each worker; ask for at"
            f" most {there:g}, or add nodes"
        )
    cores = max(int(resources.get("CPU", 0)) // workers, 1)
    workers = min(workers, shards)
    return workers, {"num_gpus": 1.0, "num_cpus": 1.0} if kind == "GPU" else {"num_cpus": float(cores)}


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected; a cluster of its own on this machine, for the block, where `address` is `local`."""
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
        raise ConfigError(f"engine.address is {address!r} but Ray cannot work there ({reason})") from error
    finally:  # Ray puts its own in their place
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray alone would try for a minute, and then say it in a page.

    Raises:
        ConfigError: `address` is no host:port, or nothing listens there.
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
