"""What a job would do, before it does it: clips, bytes, files, time, and what stands in its way."""

import functools
import itertools
import shutil
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import Clip, load_dataset
from egopatch.extract.encoders import Checkpoint, VideoEncoder, find_network, open_checkpoint
from egopatch.extract.engines.sharing import decoder_count, worker_count
from egopatch.extract.fingerprints import video_fingerprint
from egopatch.extract.planning.forecast import Forecast, forecast, given_cost, measured_cost
from egopatch.extract.video.decode import PreparedClip
from egopatch.extract.worker.batch_encoder import BatchEncoder
from egopatch.extract.worker.worker import load_encoder, open_decoders, slow_arithmetic
from egopatch.features import StoreSpec, open_store, store_exists
from egopatch.features.formats.registry import format_named
from egopatch.features.values.dtypes import row_bytes
from egopatch.features.values.location import locate


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
        files: that will be written for them.
        bytes_to_write: about.
        bytes_free: on the store's disk; None in object storage, which does not fill up.
        seconds_per_clip: decode and encode of one clip on one worker, measured on `probed` clips; None if not probed.
        hours: of the whole job with the configured workers; None if not probed.
        advice: what would make the job better, one line each.
        refusals: why the job would not start, one line each.
    """

    clips: int
    done: int
    quarantined: int
    todo: int
    without_video: int
    shards: int
    files: int
    bytes_to_write: int
    bytes_free: int | None
    probed: int
    seconds_per_clip: float | None
    hours: float | None
    advice: tuple[str, ...]
    refusals: tuple[str, ...]


def make_plan(config: Config, probe: int) -> Plan:
    """Measure the job; `probe` clips are decoded and encoded for the estimate of time, none are stored.

    Raises:
        DatasetError, CheckpointError, StoreError: as `extract.run.extract_features`.
    """
    find_network(config.encoder.arch)  # a wrong name is said before anything is read
    checkpoint = open_checkpoint(config.encoder.arch, config.encoder.checkpoint)
    standing = _standing(config, checkpoint)
    dataset = load_dataset(config.data)
    todo = [clip for clip in dataset.clips if clip.clip_id not in standing.known]
    is_there = functools.cache(Path.is_file)  # many clips share a video
    present = [clip for clip in todo if is_there(clip.video)]
    encoder = load_encoder(config, checkpoint)
    spec = clip_spec(config, encoder)
    shards = _shards(todo, standing, spec.shard)
    refusal = disk_refusal(config.store.path, spec, len(todo))
    advice = slow_arithmetic(config)
    sample = present[:: max(len(present) // probe, 1)][:probe] if probe else []
    seconds = _probe(config, encoder, sample) if sample else None
    return Plan(
        clips=len(dataset.clips),
        done=standing.done,
        quarantined=len(standing.known) - standing.done,
        todo=len(todo),
        without_video=len(todo) - len(present),
        shards=shards,
        files=shards * len(format_named(config.store.format, config.store.codec).files(spec, 0)),
        bytes_to_write=_bytes_of(spec, len(todo)),
        bytes_free=_bytes_free(config.store.path),
        probed=len(sample),
        seconds_per_clip=seconds,
        hours=None if seconds is None else seconds * len(present) / worker_count(config) / 3600,
        advice=(advice,) if advice else (),
        refusals=(refusal,) if refusal else (),
    )


def clip_spec(config: Config, encoder: VideoEncoder) -> StoreSpec:
    """What a store of `encoder`'s tokens has in it."""
    return StoreSpec.for_patches(
        frames=config.video.frames,
        grid=encoder.grid,
        width=encoder.width,
        dtype=config.store.dtype,
        shard=config.store.shard,
        codec=config.store.codec,
        coarse=encoder.coarse,
        coarse_width=encoder.coarse_width,
    )


def make_forecast(config: Config, clips: int, gpus: int, cores: int, clips_per_second: float | None) -> Forecast:
    """What `clips` clips would take on `gpus` GPUs; neither videos nor questions have to be there.

    Args:
        config: the experiment.
        clips, gpus: of the job.
        cores: beside each GPU, for decoding.
        clips_per_second: that one GPU encodes; None takes what the jobs on the configured store took.

    Raises:
        ConfigError: a number is out of range, or nothing was measured and no rate given.
        CheckpointError: as `extract.run.extract_features`.
    """
    measured = measured_cost(config.store.path)
    if clips_per_second is not None:
        cost = given_cost(clips_per_second, measured)
    elif measured is not None:
        cost = measured
    else:
        raise ConfigError(
            f"--clips is {clips} but no job on {config.store.path} was measured; encode a few hundred clips first"
            " (python -m extract run), or say what one GPU encodes with --clips-per-second"
        )
    checkpoint = open_checkpoint(config.encoder.arch, config.encoder.checkpoint)
    spec = clip_spec(config, load_encoder(config, checkpoint))
    return forecast(clips, gpus, cores, spec, config.store.format, cost)


def disk_refusal(path: Path | str, spec: StoreSpec, clips: int) -> str | None:
    """Why `clips` more rows cannot be written to the store at `path`, or None if they can."""
    needed, free = _bytes_of(spec, clips), _bytes_free(path)
    if free is None or needed <= free:
        return None
    return (
        f"store.path is {path}: {clips} clips need {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free;"
        " make room or choose another disk"
    )


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    lines = [
        f"clips      {plan.clips}: {plan.done} stored, {plan.quarantined} in quarantine, {plan.todo} to do"
        + (f" ({plan.without_video} have no video file)" if plan.without_video else ""),
        f"writes     {plan.shards} shards in {plan.files} files, {plan.bytes_to_write / 1e9:.3f} GB"
        + (f"; {plan.bytes_free / 1e9:.1f} GB free" if plan.bytes_free is not None else ""),
    ]
    if plan.hours is not None and plan.seconds_per_clip is not None:
        lines.append(
            f"time       about {_duration(plan.hours)}: {plan.seconds_per_clip:.3f} s a clip, measured on {plan.probed}"
        )
    lines += [f"advice     {line}" for line in plan.advice]
    return "\n".join(lines + [f"refused    {line}" for line in plan.refusals])


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


@dataclass(frozen=True)
class _Standing:
    """What a plan has to know of the store, a fraction of what an open one holds of every clip.

    Attributes:
        done: clips that are committed.
        known: their ids and those in quarantine.
        waiting: shard of each other id that has a row.
        rows: of the store.
    """

    done: int = 0
    known: Set[str] = frozenset()
    waiting: Mapping[str, int] = field(default_factory=dict)
    rows: int = 0


def _standing(config: Config, checkpoint: Checkpoint) -> _Standing:
    """How far the store is. It is let go of again: open stores and data sets are both large where clips are many."""
    if not store_exists(config.store.path):
        return _Standing()
    with open_store(config.store.path, expect=video_fingerprint(config, checkpoint.sha256)) as store:
        committed = store.clip_ids
        return _Standing(
            done=len(committed),
            known={*committed, *store.quarantine},
            waiting={clip_id: work.shard for work in store.missing_shards() for clip_id in work.ids},
            rows=len(store.planned_ids),
        )


def _shards(todo: Sequence[Clip], standing: _Standing, size: int) -> int:
    """How many shards of `size` rows the clips to do lie in; those that have no row yet get the next ones."""
    fresh = itertools.count(standing.rows)
    waiting = standing.waiting
    return len({waiting[c.clip_id] if c.clip_id in waiting else next(fresh) // size for c in todo})


def _bytes_of(spec: StoreSpec, clips: int) -> int:
    return clips * sum(row_bytes(array) for array in spec.arrays)


def _bytes_free(path: Path | str) -> int | None:
    location = locate(path)
    return shutil.disk_usage(_existing_parent(location)).free if isinstance(location, Path) else None


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())


def _probe(config: Config, encoder: VideoEncoder, sample: list[Clip]) -> float:
    """Seconds a clip: the slower of decoding (children together) and encoding, since they overlap."""
    with open_decoders(config, decoder_count(config, worker_count(config))) as pool:
        for _ in pool.map(sample):  # starting the children is not part of the rate
            pass
        decode_started = time.perf_counter()
        prepared = [one for one in pool.map(sample) if isinstance(one, PreparedClip)]
        decode = (time.perf_counter() - decode_started) / len(sample)
    if not prepared:
        return decode
    with BatchEncoder(encoder, config.encoder.batch, config.store.dtype) as batches:
        batch = [prepared[i % len(prepared)] for i in range(batches.size)]
        batches.start(batch)()  # the first is slower than those that follow
        warm = batches.seconds
        batches.start(batch)()
    return max(decode, (batches.seconds - warm) / len(batch))
