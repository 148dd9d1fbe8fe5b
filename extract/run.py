"""Stage one: every clip and every question of a data set, encoded once and stored."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from egopatch.configs.schema import Config
from egopatch.extract.datasets import load_dataset
from egopatch.extract.datasets.origins import OriginCheck, compare_origins
from egopatch.extract.encoders import (
    Checkpoint,
    TextEncoder,
    Tokenizer,
    load_text_encoder,
    load_tokenizer,
    open_text_checkpoint,
)
from egopatch.extract.engines.dispatch import encode_with_engine
from egopatch.extract.engines.job_slice import ALL_SHARDS, Slice
from egopatch.extract.fingerprints import text_depth, text_fingerprint
from egopatch.extract.planning.plan import disk_refusal
from egopatch.extract.worker.job import ExtractionJob, resolve_job
from egopatch.extract.worker.job_stats import JobStats, record_job
from egopatch.extract.worker.shard_writer import ShardWriter
from egopatch.features import StoreError, StoreSpec, create_store
from egopatch.features.common.machine import limit_threads
from egopatch.features.common.progress import ProgressDisplay
from egopatch.features.state.counts import read_origins
from egopatch.features.store.text_substore import TEXT_FOLDER
from egopatch.features.values.location import parse_location
from egopatch.features.values.spec import unscaled_dtype

TEXT_BATCH = 64


@dataclass(frozen=True)
class ExtractionResult:
    """State of the store after a job.

    Attributes:
        stats: What this job did.
        clips: Number of clips committed in the store.
        planned: Number of clips that have a row in the store.
        quarantine: Reason by clip id.
        texts: Number of question texts in the store.
        errors: Reconstruction error by quantised array, as `Store.reconstruction_error`.
        check: The stored clips of this job's shards, compared with the annotations. Those that are still stale are
            held by another job, or were encoded by one with other annotations.
    """

    stats: JobStats
    clips: int
    planned: int
    quarantine: dict[str, str]
    texts: int
    errors: dict[str, float]
    check: OriginCheck


def extract_features(
    config: Config, retry: bool = False, job_slice: Slice = ALL_SHARDS, refresh: bool = False
) -> ExtractionResult:
    """Encode everything that is missing from the store.

    Args:
        config: The experiment.
        retry: Whether to try the quarantined clips again.
        job_slice: The shards of this job, where several jobs divide them.
        refresh: Whether to encode stale clips again; without it, a store with stale clips is refused.

    Raises:
        DatasetError, CheckpointError, StoreError: The input is wrong or the disk is full; no clip was written.
        TooManyErrors: More clips failed than `engine.max_errors`; committed shards stay.
        WorkersKilled: Workers were killed after every restart; committed shards stay.
    """
    limit_threads()
    job = resolve_job(config)
    dataset = load_dataset(config.data)
    root = config.data.root
    if not refresh:
        # Before the store gets rows for the new clips of what may be another data set.
        _refuse_stale(config, compare_origins(dataset.clips, root, read_origins(config.store.path)))
    ids = [clip.clip_id for clip in dataset.clips]
    network = _load_text_network(job)  # before the store is created: a wrong text.model leaves nothing behind
    store = create_store(config.store.path, job.spec, job.fingerprint, ids, format=config.store.format)
    texts = _encode_texts(job, network, dataset.texts, job_slice)
    clips = {clip.clip_id: clip for clip in dataset.clips}
    stale = compare_origins(dataset.clips, root, store.origins()).stale if refresh else {}
    # A store may hold clips of a larger data set; only those of this one have videos to encode.
    works = [
        dataclasses.replace(work, ids=known)
        for work in job_slice.of(store.missing_shards(retry_quarantined=retry, replace=stale))
        if (known := tuple(clip_id for clip_id in work.ids if clip_id in clips))
    ]
    todo = sum(len(work.ids) for work in works)
    if refusal := disk_refusal(config.store.path, job.spec, todo):
        raise StoreError(refusal)
    stats = JobStats()
    if works:
        with ProgressDisplay("encode", todo, "clips") as display:
            stats = encode_with_engine(job, store, works, clips, display.advance)
        store.catalog.refresh()
        record_job(config.store.path, stats, config.engine.name, config.engine.workers)
    mine = [clip for clip in dataset.clips if job_slice.has(store.catalog.shard_of(store.catalog.rows[clip.clip_id]))]
    return ExtractionResult(
        stats=stats,
        clips=len(store.clip_ids),
        planned=len(store.planned_ids),
        quarantine={clip_id: record.reason for clip_id, record in store.quarantine.items()},
        texts=texts,
        errors=dict(store.reconstruction_error),
        check=compare_origins(mine, root, store.origins()),
    )


def _refuse_stale(config: Config, check: OriginCheck) -> None:
    if check.stale:
        raise StoreError(f"store.path is {config.store.path}: {check.stale_line()}")


@dataclass(frozen=True)
class _TextNetwork:
    """The frozen text network on the job's device, with its checkpoint and tokenizer."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    encoder: TextEncoder


def _load_text_network(job: ExtractionJob) -> _TextNetwork:
    text = job.config.text
    checkpoint = open_text_checkpoint(job.network, job.checkpoint, text.model)
    tokenizer = load_tokenizer(text.model, text.max_length)
    encoder = load_text_encoder(job.network, checkpoint, depth=text_depth(job.config)).to(job.device).eval()
    return _TextNetwork(checkpoint, tokenizer, encoder)


def _encode_texts(job: ExtractionJob, network: _TextNetwork, texts: Sequence[str], job_slice: Slice) -> int:
    """Encode the question texts that are missing from the text substore; returns the number that it holds."""
    config, encoder = job.config, network.encoder
    spec = StoreSpec.for_text(config.text.max_length, encoder.width, config.store.dtype, codec=config.store.codec)
    fingerprint = text_fingerprint(config, job.network, network.checkpoint.sha256)
    store = create_store(
        parse_location(config.store.path) / TEXT_FOLDER, spec, fingerprint, texts, format=config.store.format
    )
    works = job_slice.of(store.missing_shards())
    if works:
        todo = sum(len(work.ids) for work in works)
        dtype = getattr(torch, unscaled_dtype(config.store.dtype))
        with ProgressDisplay("questions", todo, "questions") as display, ShardWriter(store, max_errors=0) as writer:
            for work, uncommitted in writer.leases(works):
                rows: dict[str, dict[str, torch.Tensor]] = {}
                for start in range(0, len(uncommitted), TEXT_BATCH):
                    batch = uncommitted[start : start + TEXT_BATCH]
                    rows |= _encode_text_batch(encoder, network.tokenizer, batch, job.device, dtype)
                    display.advance(len(batch))
                sources = {text: hashlib.sha256(text.encode()).hexdigest() for text in rows}
                writer.write(work, rows, sources, {}, {})
            writer.wait()
        store.catalog.refresh()
    return len(store.clip_ids)


def _encode_text_batch(
    encoder: TextEncoder, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    # Always the same shape; `extract.worker.batch_encoder` gives the reason.
    ids, mask = tokenizer([*texts, *[texts[-1]] * (TEXT_BATCH - len(texts))])
    with torch.inference_mode():
        states = encoder(ids.to(device), mask.to(device)).to(dtype).cpu()
    return {text: {"states": states[i], "attention_mask": mask[i].bool()} for i, text in enumerate(texts)}
