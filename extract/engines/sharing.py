"""How the workers of one job share its shards, whichever engine started them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import torch

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip
from egopatch.extract.encoders import open_checkpoint
from egopatch.extract.engines.interrupts import start_trackers
from egopatch.extract.worker.job_stats import Tally
from egopatch.extract.worker.pipeline import encode_shards
from egopatch.extract.worker.worker import load_encoder
from egopatch.features import ShardWork, Store, open_store


class WorkersDied(RuntimeError):
    """A worker was killed; the others have ended too, and what all of them did is in the ledger."""


def share_work(
    config: Config,
    rank: int,
    workers: int,
    works: Sequence[ShardWork],
    clips: Mapping[str, Clip],
    decoders: int,
    device: str | None = None,
) -> Tally:
    """What worker `rank` of `workers` does of `works`: every `workers`-th shard, then what the others left.

    Nobody plans who is slow: long videos, a busy machine or a dead neighbour leave shards without a lease, and whoever
    is through with its own takes them, from the end on, where their first owners come last.

    Args: as for `extract.worker.pipeline.encode_shards`, and `device`, which else is `encoder.device`.
    """
    start_trackers()
    encoder = load_encoder(config, open_checkpoint(config.encoder.arch, config.encoder.checkpoint), device)
    store = open_store(config.store.path)
    tally = encode_shards(config, encoder, store, works[rank::workers], clips, decoders, lambda clips, nbytes: None)
    store.refresh()
    if left := still_missing(works, store):
        more = encode_shards(config, encoder, store, left[::-1], clips, decoders, lambda clips, nbytes: None)
        # What is owned by a neighbour is not left undone.
        tally += dataclasses.replace(more, skipped=())
    return tally


def still_missing(works: Sequence[ShardWork], store: Store) -> list[ShardWork]:
    """What `store`, refreshed, says is to be done of `works`."""
    missing = set(store.missing())
    return [ShardWork(work.shard, ids) for work in works if (ids := tuple(i for i in work.ids if i in missing))]


def worker_count(config: Config) -> int:
    """`auto` is one worker a GPU of this machine, or one on a machine without."""
    if config.engine.workers == "auto":
        return max(torch.cuda.device_count(), 1)
    return config.engine.workers


def decoder_count(config: Config, workers: int) -> int:
    """`auto` shares this machine's cores between its `workers`, at most 8 each."""
    if config.engine.decoders == "auto":
        return max(min((os.cpu_count() or 1) // workers, 8), 1)
    return config.engine.decoders
