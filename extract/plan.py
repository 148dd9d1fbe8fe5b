"""What a job would do, before it does it: clips, bytes, files, time, and what stands in its way."""

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import Config
from extract.datasets import Clip, Dataset, load_dataset
from extract.decode import PreparedClip
from extract.encoders import open_checkpoint
from extract.engines import decoder_count, worker_count
from extract.fingerprints import video_fingerprint
from extract.worker import load_encoder, open_decoders
from features import Store, StoreSpec, open_store
from features.dtypes import row_bytes


@dataclass(frozen=True)
class Plan:
    """The size of a job.

    Attributes:
        clips: in the data set.
        done: committed already.
        quarantined: tried and failed already.
        todo: still to encode.
        without_video: of these, clips whose video file is absent.
        shards: that will be written.
        bytes_to_write: about.
        bytes_free: on the store's disk.
        seconds_per_clip: decode and encode of one clip on one worker, measured on `probed` clips; None if not probed.
        hours: of the whole job with the configured workers; None if not probed.
        refusals: why the job would not start, one line each.
    """

    clips: int
    done: int
    quarantined: int
    todo: int
    without_video: int
    shards: int
    bytes_to_write: int
    bytes_free: int
    probed: int
    seconds_per_clip: float | None
    hours: float | None
    refusals: tuple[str, ...]


def make_plan(config: Config, probe: int) -> Plan:
    """Measure the job; `probe` clips are decoded and encoded for the estimate of time, none are stored.

    Raises:
        DatasetError, CheckpointError, StoreError: as `extract.run.extract_features`.
    """
    dataset = load_dataset(config.data)
    checkpoint = open_checkpoint(config.encoder.arch, config.encoder.checkpoint)
    fingerprint = video_fingerprint(config, checkpoint.sha256)
    store = open_store(config.store.path, expect=fingerprint) if config.store.path.exists() else None
    todo = _todo(dataset, store)
    present = [clip for clip in todo if clip.video.is_file()]
    encoder = load_encoder(config, checkpoint)
    row_bytes = _row_bytes(
        StoreSpec.for_patches(
            config.video.frames,
            encoder.grid,
            encoder.width,
            config.store.dtype,
            config.store.shard,
            encoder.coarse,
            encoder.coarse_width,
        )
    )
    free = shutil.disk_usage(_existing_parent(config.store.path)).free
    refusals = []
    if row_bytes * len(todo) > free:
        refusals.append(f"store.path needs {row_bytes * len(todo) / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB")
    sample = present[:: max(len(present) // probe, 1)][:probe] if probe else []
    seconds = _probe(config, encoder, sample) if sample else None
    return Plan(
        clips=len(dataset.clips),
        done=len(store.clip_ids) if store else 0,
        quarantined=len(store.quarantine) if store else 0,
        todo=len(todo),
        without_video=len(todo) - len(present),
        shards=math.ceil(len(todo) / config.store.shard),
        bytes_to_write=row_bytes * len(todo),
        bytes_free=free,
        probed=len(sample),
        seconds_per_clip=seconds,
        hours=None if seconds is None else seconds * len(present) / worker_count(config) / 3600,
        refusals=tuple(refusals),
    )


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    lines = [
        f"clips      {plan.clips}: {plan.done} stored, {plan.quarantined} in quarantine, {plan.todo} to do"
        + (f" ({plan.without_video} have no video file)" if plan.without_video else ""),
        f"writes     {plan.shards} shards, {plan.bytes_to_write / 1e9:.3f} GB; {plan.bytes_free / 1e9:.1f} GB free",
    ]
    if plan.hours is not None and plan.seconds_per_clip is not None:
        lines.append(
            f"time       about {_duration(plan.hours)}: {plan.seconds_per_clip:.3f} s a clip, measured on {plan.probed}"
        )
    return "\n".join(lines + [f"refused    {line}" for line in plan.refusals])


def as_json(plan: Plan) -> dict[str, object]:
    """The plan as plain values."""
    return dataclasses.asdict(plan)


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _todo(dataset: Dataset, store: Store | None) -> list[Clip]:
    known = {*store.clip_ids, *store.quarantine} if store else set()
    return [clip for clip in dataset.clips if clip.clip_id not in known]


def _row_bytes(spec: StoreSpec) -> int:
    return sum(row_bytes(array) for array in spec.arrays)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())


def _probe(config: Config, encoder: torch.nn.Module, sample: list[Clip]) -> float:
    """Seconds a clip: the slower of decoding (children together) and encoding, since they overlap."""
    with open_decoders(config, decoder_count(config, worker_count(config))) as pool:
        for _ in pool.map(sample):  # starting the children is not part of the rate
            pass
        decode_started = time.perf_counter()
        prepared = [one for one in pool.map(sample) if isinstance(one, PreparedClip)]
        decode = (time.perf_counter() - decode_started) / len(sample)
    if not prepared:
        return decode
    device = next(encoder.parameters()).device
    frames = torch.stack([torch.from_numpy(one.frames) for one in prepared[: config.encoder.batch]]).to(device)
    encode_started = time.perf_counter()
    with torch.inference_mode():
        encoder(frames).patches.sum().item()
    return max(decode, (time.perf_counter() - encode_started) / len(frames))
