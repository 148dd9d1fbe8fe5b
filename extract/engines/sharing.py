"""How the workers of one job share its shards, whatever engine started them."""

import dataclasses
import pickle
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import Clip
from egopatch.extract.encoders import Network
from egopatch.extract.feed.pool import decoder_count
from egopatch.extract.worker.device import EVERY_GPU
from egopatch.extract.worker.job import resolve_job
from egopatch.extract.worker.job_stats import JobStats
from egopatch.extract.worker.pipeline import encode_shards
from egopatch.features import ShardWork, Store, open_store
from egopatch.features.common.child_errors import sendable_errors
from egopatch.features.common.machine import limit_threads, usable_gpus
from egopatch.features.common.signals import start_trackers


@dataclass(frozen=True)
class SharedJob:
    """The data that all workers of one job receive.

    Attributes:
        config: Configuration of the job.
        packed_network: The network that `encoder.arch` names, by `pack_network`.
        works: All shards of the job, and the clips that each still needs.
        clips: As for `extract.worker.pipeline.encode_shards`.
    """

    config: Config
    packed_network: bytes
    works: Sequence[ShardWork]
    clips: Mapping[str, Clip]


class WorkersDied(RuntimeError):
    """A worker was killed and the others have ended; the ledger lists what all of them committed."""


def pack_network(network: Network) -> bytes:
    """Pack `network` for worker processes; `run_worker` unpacks it.

    It includes the code of functions from a script or a notebook, because no other process can import them.

    Raises:
        ConfigError: The network holds something that cannot be sent to another process.
    """
    import cloudpickle  # imported here to save start-up time

    try:
        return bytes(cloudpickle.dumps(network))
    except Exception as error:  # objects that its functions hold may raise anything
        raise ConfigError(
            f"encoder.arch is {network.name!r}, which cannot be sent to worker processes ({error}); its functions"
            " must not hold open files, locks or the like: change them, or use engine.name joblib with engine.workers 1"
        ) from error


def _unpack_network(packed: bytes, arch: str) -> Network:
    try:
        network = pickle.loads(packed)
    except Exception as error:  # the modules that it imports may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"encoder.arch is {arch!r}, which a worker on {socket.gethostname()} cannot load ({reason}); install the"
            " package that it comes from on every node, or define its functions in the script that registers it"
        ) from error
    assert isinstance(network, Network)
    return network


@sendable_errors()
def run_worker(shared: SharedJob, rank: int, workers: int, device: str, neighbours: int) -> JobStats:
    """Run worker `rank` of `workers` in its own process: every `workers`-th shard, then those that the others left.

    The load balances itself: a slow or dead worker leaves shards without a lease, and the first worker to finish its
    own takes them, in reverse order, because the worker they belong to reaches the last ones last.

    Args:
        shared: The job.
        rank: Number of this worker, from 0 on.
        workers: Number of the job's workers on all machines.
        device: Device of this worker, which replaces `encoder.device`.
        neighbours: Number of the job's workers on this machine, including this one.

    Raises:
        ConfigError: This process cannot load the network.
        TooManyErrors, StoreError: As `extract.worker.pipeline.encode_shards`.
        ChildError: Any other error that cannot be sent to the job's process.
    """
    start_trackers()
    config, works = shared.config, shared.works
    network = _unpack_network(shared.packed_network, config.encoder.arch)
    limit_threads(neighbours)
    decoders = decoder_count(config, neighbours)
    job = resolve_job(config, device, network)
    store = open_store(config.store.path)
    stats = encode_shards(job, store, works[rank::workers], shared.clips, decoders)
    store.catalog.refresh()
    if left := still_missing(works, store):
        more = encode_shards(job, store, left[::-1], shared.clips, decoders)
        # A shard that another worker of this job holds is not skipped.
        stats += dataclasses.replace(more, skipped=())
    return stats


def still_missing(works: Sequence[ShardWork], store: Store) -> list[ShardWork]:
    """The `works`, with the clips in each, that `store` still needs; the store must have just been refreshed."""
    missing, quarantine, left = set(store.missing()), store.quarantine, []
    for work in works:
        replaces = {name: work.replaces[name] for name in store.catalog.unchanged(work.replaces)}
        # A clip that has failed again since then has one more attempt.
        untried = {
            name: attempts
            for name, attempts in work.retries.items()
            if name in quarantine and quarantine[name].attempts == attempts
        }
        if ids := tuple(name for name in work.ids if name in missing or name in replaces or name in untried):
            left.append(ShardWork(work.shard, ids, replaces, untried))
    return left


def worker_count(config: Config) -> int:
    """Number of workers; `auto` is one for each GPU of this machine that `encoder.device` allows, and at least one."""
    if config.engine.workers == "auto":
        return max(usable_gpus(), 1) if config.encoder.device in EVERY_GPU else 1
    return config.engine.workers
