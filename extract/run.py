"""Stage one: every clip and every question of a data set, encoded once and stored."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Dataset, load_dataset
from egopatch.extract.encoders import (
    Checkpoint,
    VideoEncoder,
    find_network,
    load_text_encoder,
    load_tokenizer,
    open_checkpoint,
    open_text_checkpoint,
)
from egopatch.extract.encoders.networks.text import TextEncoder, Tokenizer
from egopatch.extract.engines.dispatch import WHOLE, Part, encode_with_engine
from egopatch.extract.fingerprints import text_depth, text_fingerprint, video_fingerprint
from egopatch.extract.planning.plan import clip_spec, disk_refusal
from egopatch.extract.progress import meter
from egopatch.extract.worker.job_stats import Tally, record_job
from egopatch.extract.worker.shard_writer import ShardWriter
from egopatch.extract.worker.worker import device_of, load_encoder
from egopatch.features import ShardWork, Store, StoreError, StoreSpec, create_store
from egopatch.features.store.text_substore import TEXT
from egopatch.features.values.location import locate
from egopatch.features.values.spec import whole_dtype

TEXT_BATCH = 64


@dataclass(frozen=True)
class Outcome:
    """What a job left behind.

    Attributes:
        tally: what this job did.
        clips: committed in the store now.
        planned: clips of the data set.
        quarantine: reason by clip id.
        texts: question texts in the store.
        errors: what storing tokens in few bits cost, by array: as `Store.reconstruction_error`.
    """

    tally: Tally
    clips: int
    planned: int
    quarantine: dict[str, str]
    texts: int
    errors: dict[str, float]


def extract_features(config: Config, retry: bool = False, part: Part = WHOLE) -> Outcome:
    """Encode what the store does not have yet.

    Args:
        config: the experiment.
        retry: also try the quarantined clips again.
        part: of the shards, where several jobs share them.

    Raises:
        DatasetError, CheckpointError, StoreError: wrong input or a full disk, in one line; nothing was written.
        TooManyErrors: more clips failed than `engine.max_errors`; what was committed stays.
        WorkersKilled: again and again; what was committed stays.
    """
    find_network(config.encoder.arch)  # a wrong name is said before anything is read
    dataset = load_dataset(config.data)
    checkpoint = open_checkpoint(config.encoder.arch, config.encoder.checkpoint)
    encoder = load_encoder(config, checkpoint)
    store = create_clip_store(config, dataset, encoder, checkpoint)
    texts = _encode_texts(config, dataset, checkpoint, part)
    clips = {clip.clip_id: clip for clip in dataset.clips}
    # A store may hold clips of a larger data set; only those of this one have videos to encode.
    works = [
        ShardWork(work.shard, ids)
        for work in part.of(store.missing_shards(retry_quarantined=retry))
        if (ids := tuple(clip_id for clip_id in work.ids if clip_id in clips))
    ]
    todo = sum(len(work.ids) for work in works)
    if refusal := disk_refusal(config.store.path, store.spec, todo):
        raise StoreError(refusal)
    tally = Tally()
    if works:
        with meter("encode", todo, "clips") as shown:
            tally = encode_with_engine(config, encoder, store, works, clips, shown.advance)
        store.refresh()
        record_job(config.store.path, tally, config.engine.name, config.engine.workers)
    return Outcome(
        tally=tally,
        clips=len(store.clip_ids),
        planned=len(store.planned_ids),
        quarantine={clip_id: record.reason for clip_id, record in store.quarantine.items()},
        texts=texts,
        errors=dict(store.reconstruction_error),
    )


def create_clip_store(config: Config, dataset: Dataset, encoder: VideoEncoder, checkpoint: Checkpoint) -> Store:
    """The store of `config`, made or opened, with a row for every clip of `dataset`.

    Raises:
        StoreError: the store there was made otherwise; the message names the differing fields.
    """
    ids = [clip.clip_id for clip in dataset.clips]
    fingerprint = video_fingerprint(config, checkpoint.sha256)
    return create_store(config.store.path, clip_spec(config, encoder), fingerprint, ids, format=config.store.format)


def _encode_texts(config: Config, dataset: Dataset, video: Checkpoint, part: Part) -> int:
    """Encode the questions that the text store misses; returns how many it holds."""
    checkpoint = open_text_checkpoint(config.encoder.arch, video, config.text.model)
    tokenizer = load_tokenizer(config.text.model, config.text.max_length)
    encoder = load_text_encoder(config.encoder.arch, checkpoint, depth=text_depth(config))
    encoder = encoder.to(device_of(config.encoder.device)).eval()
    spec = StoreSpec.for_text(config.text.max_length, encoder.width, config.store.dtype, codec=config.store.codec)
    fingerprint = text_fingerprint(config, checkpoint.sha256)
    store = create_store(locate(config.store.path) / TEXT, spec, fingerprint, dataset.texts, format=config.store.format)
    works = part.of(store.missing_shards())
    if works:
        todo = sum(len(work.ids) for work in works)
        with meter("questions", todo, "questions") as shown, ShardWriter(store, max_errors=0) as writer:
            for work, uncommitted in writer.leases(works):
                rows: dict[str, dict[str, torch.Tensor]] = {}
                for start in range(0, len(uncommitted), TEXT_BATCH):
                    texts = uncommitted[start : start + TEXT_BATCH]
                    rows |= _encode_text_batch(config, encoder, tokenizer, texts)
                    shown.advance(len(texts))
                sources = {text: hashlib.sha256(text.encode()).hexdigest() for text in rows}
                writer.write(work.shard, rows, sources, {})
            writer.wait()
        store.refresh()
    return len(store.clip_ids)


def _encode_text_batch(
    config: Config, encoder: TextEncoder, tokenizer: Tokenizer, texts: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    device = next(encoder.parameters()).device
    # Always one shape, as in `extract.worker.batch_encoder` and for its reason.
    ids, mask = tokenizer([*texts, *[texts[-1]] * (TEXT_BATCH - len(texts))])
    with torch.inference_mode():
        states = encoder(ids.to(device), mask.to(device)).to(getattr(torch, whole_dtype(config.store.dtype))).cpu()
    return {text: {"states": states[i], "attention_mask": mask[i].bool()} for i, text in enumerate(texts)}
