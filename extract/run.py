"""Stage one: every clip and every question of a data set, encoded once and stored."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from configs.schema import Config
from extract.datasets import Dataset, load_dataset
from extract.encoders import (
    Checkpoint,
    VideoEncoder,
    load_text_encoder,
    load_tokenizer,
    open_checkpoint,
    open_text_checkpoint,
)
from extract.encoders.text import TextEncoder, Tokenizer
from extract.engines import encode_with_engine
from extract.fingerprints import text_depth, text_fingerprint, video_fingerprint
from extract.progress import meter
from extract.worker import Tally, device_of, load_encoder
from features import Store, StoreSpec, create_store

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
    """

    tally: Tally
    clips: int
    planned: int
    quarantine: dict[str, str]
    texts: int


def extract_features(config: Config, retry: bool = False) -> Outcome:
    """Encode what the store does not have yet.

    Args:
        config: the experiment.
        retry: also try the quarantined clips again.

    Raises:
        DatasetError, CheckpointError, StoreError: wrong input, in one line; nothing was written.
        TooManyErrors: more clips failed than `engine.max_errors`; what was committed stays.
    """
    dataset = load_dataset(config.data)
    checkpoint = open_checkpoint(config.encoder.arch, config.encoder.checkpoint)
    encoder = load_encoder(config, checkpoint)
    store = create_clip_store(config, dataset, encoder, checkpoint)
    texts = _encode_texts(config, dataset, checkpoint)
    works = store.missing_shards(retry_quarantined=retry)
    clips = {clip.clip_id: clip for clip in dataset.clips}
    # A store may hold clips of a larger data set; only those of this one have videos to encode.
    works = [dataclasses.replace(w, ids=ids) for w in works if (ids := tuple(i for i in w.ids if i in clips))]
    tally = Tally()
    if works:
        with meter("encode", sum(len(work.ids) for work in works), "clips") as shown:
            tally = encode_with_engine(config, encoder, store, works, clips, shown.advance)
    return Outcome(
        tally=tally,
        clips=len(store.clip_ids),
        planned=len(store.planned_ids),
        quarantine={clip_id: record.reason for clip_id, record in store.quarantine.items()},
        texts=texts,
    )


def create_clip_store(config: Config, dataset: Dataset, encoder: VideoEncoder, checkpoint: Checkpoint) -> Store:
    """The store of `config`, made or opened, with a row for every clip of `dataset`.

    Raises:
        StoreError: the store there was made otherwise; the message names the differing fields.
    """
    spec = StoreSpec.for_patches(
        frames=config.video.frames,
        grid=encoder.grid,
        width=encoder.width,
        dtype=config.store.dtype,
        shard=config.store.shard,
        codec=config.store.codec,
        coarse=encoder.coarse,
        coarse_width=encoder.coarse_width,
    )
    ids = [clip.clip_id for clip in dataset.clips]
    fingerprint = video_fingerprint(config, checkpoint.sha256)
    return create_store(config.store.path, spec, fingerprint, ids, format=config.store.format)


def _encode_texts(config: Config, dataset: Dataset, video: Checkpoint) -> int:
    """Encode the questions that the text store misses; returns how many it holds."""
    checkpoint = open_text_checkpoint(config.encoder.arch, video, config.text.model)
    tokenizer = load_tokenizer(config.text.model, config.text.max_length)
    encoder = load_text_encoder(config.encoder.arch, checkpoint, depth=text_depth(config))
    encoder = encoder.to(device_of(config.encoder.device)).eval()
    spec = StoreSpec.for_text(config.text.max_length, encoder.width, config.store.dtype, codec=config.store.codec)
    fingerprint = text_fingerprint(config, checkpoint.sha256)
    store = create_store(config.store.path / "text", spec, fingerprint, dataset.texts, format=config.store.format)
    works = store.missing_shards()
    if works:
        with meter("questions", sum(len(work.ids) for work in works), "questions") as shown:
            for work in works:
                rows: dict[str, dict[str, torch.Tensor]] = {}
                for start in range(0, len(work.ids), TEXT_BATCH):
                    texts = work.ids[start : start + TEXT_BATCH]
                    rows |= _encode_text_batch(config, encoder, tokenizer, texts)
                    shown.advance(len(texts))
                sources = {text: hashlib.sha256(text.encode()).hexdigest() for text in work.ids}
                store.write_shard(work.shard, rows, sources)
    return len(store.clip_ids)


def _encode_text_batch(
    config: Config, encoder: TextEncoder, tokenizer: Tokenizer, texts: Sequence[str]
) -> dict[str, dict[str, torch.Tensor]]:
    device = next(encoder.parameters()).device
    ids, mask = tokenizer(list(texts))
    with torch.inference_mode():
        states = encoder(ids.to(device), mask.to(device)).to(getattr(torch, config.store.dtype)).cpu()
    return {text: {"states": states[i], "attention_mask": mask[i].bool()} for i, text in enumerate(texts)}
