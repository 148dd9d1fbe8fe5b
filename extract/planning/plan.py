"""What a job would do: clips, bytes, files and time, and why it would be refused."""

import functools
import itertools
import shlex
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from egopatch.configs.schema import Config
from egopatch.extract.datasets import Clip, load_dataset
from egopatch.extract.datasets.origins import compare_origins, unrecorded_line
from egopatch.extract.engines.sharing import worker_count
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.measure import measure_decoding
from egopatch.extract.feed.pool import decoder_count
from egopatch.extract.planning.forecast import format_duration, measured_cost
from egopatch.extract.transcoding.hint import gpu_decoder_hint, long_groups_hint
from egopatch.extract.worker.bottleneck import ASK_PLAN, bottleneck_line
from egopatch.extract.worker.device import arithmetic_advice, shortage_explained
from egopatch.extract.worker.job import ExtractionJob, resolve_job
from egopatch.features import StoreSpec, open_store, store_exists
from egopatch.features.common.disk import free_bytes
from egopatch.features.common.machine import limit_threads
from egopatch.features.common.units import counted, format_bytes
from egopatch.features.formats.registry import format_named
from egopatch.features.state.header import HEADER
from egopatch.features.state.ledger import ledger_journal
from egopatch.features.state.origin import Origin
from egopatch.features.storage.pick import storage_at
from egopatch.features.values.dtypes import spec_row_bytes
from egopatch.features.values.errors import DamagedStore
from egopatch.features.values.location import parse_location


@dataclass(frozen=True)
class Plan:
    """The size of a job.

    Attributes:
        clips: Number of clips in the data set.
        done: Number of them that are committed.
        stale: Committed clips that no longer match the annotations, each with the difference.
        unrecorded: Number of committed clips that cannot be compared, because an earlier version stored them.
        quarantined: Number of them that are in quarantine.
        todo: Number of clips to encode.
        without_video: Number of clips to encode whose video file is missing.
        shards: Number of shards to write.
        files: Number of files to write for these shards.
        bytes_to_write: Size of these files.
        bytes_free: Free space on the store's disk; None in object storage, which does not fill up.
        probed: Number of clips that were decoded and encoded to measure the time.
        seconds_per_clip: Time of one worker for one clip in its slowest stage; None if no clip was probed.
        hours: Duration of the job with the configured workers; None if no clip was probed.
        ceilings: Clips a second that each stage of a worker could do, as probed; the disk's is from earlier jobs.
        advice: Changes that would make the job faster or its tokens better, one line each.
        refusals: Reasons why the job would not start, one line each.
    """

    clips: int
    done: int
    stale: Mapping[str, str]
    unrecorded: int
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
    ceilings: Mapping[str, float]
    advice: tuple[str, ...]
    refusals: tuple[str, ...]


def make_plan(config: Config, probe: int) -> Plan:
    """Measure the job; `probe` clips are decoded and encoded to estimate its duration, but not stored.

    Raises:
        DatasetError, CheckpointError, StoreError: As `extract.run.extract_together`.
    """
    limit_threads()
    job = resolve_job(config)
    stored = _stored_rows(job)
    dataset = load_dataset(config.data)
    todo = [
        clip for clip in dataset.clips if clip.clip_id not in stored.origins and clip.clip_id not in stored.quarantined
    ]
    exists = functools.cache(Path.is_file)  # many clips share a video
    present = [clip for clip in todo if exists(clip.video)]
    shards = _shards(todo, stored, job.spec.shard)
    check = compare_origins(dataset.clips, config.data.root, stored.origins)
    refusals = [check.stale_line()] if check.stale else []
    if refusal := disk_refusal(config.store.path, job.spec, len(todo)):
        refusals.append(refusal)
    sample = present[:: max(len(present) // probe, 1)][:probe] if probe else []
    rates = _probe(job, sample) if sample else {}
    seconds = 1 / min(rates.values()) if rates else None
    advice = [arithmetic_advice(config, job.device), job.frames_line]
    if sample:
        advice.append(long_groups_hint(sample, config.video))
        advice.append(gpu_decoder_hint(sample, config.video, decoder_count(config, worker_count(config))))
    return Plan(
        clips=len(dataset.clips),
        done=sum(clip.clip_id in stored.origins for clip in dataset.clips),
        stale=check.stale,
        unrecorded=check.unrecorded,
        quarantined=sum(clip.clip_id in stored.quarantined for clip in dataset.clips),
        todo=len(todo),
        without_video=len(todo) - len(present),
        shards=shards,
        files=shards * len(format_named(config.store.format, config.store.codec).file_names(job.spec, 0)),
        bytes_to_write=len(todo) * spec_row_bytes(job.spec),
        bytes_free=_bytes_free(config.store.path),
        probed=len(sample),
        seconds_per_clip=seconds,
        ceilings=rates,
        hours=None if seconds is None else seconds * len(present) / worker_count(config) / 3600,
        advice=tuple(filter(None, advice)),
        refusals=tuple(refusals),
    )


def disk_refusal(path: Path | str, spec: StoreSpec, clips: int) -> str | None:
    """Why the disk cannot hold `clips` more rows of the store at `path`; None if it can."""
    needed, free = clips * spec_row_bytes(spec), _bytes_free(path)
    if free is None or needed <= free:
        return None
    return (
        f"store.path is {path}: {counted(clips, 'clip needs', 'clips need')} {format_bytes(needed)}, but its disk has "
        f"{format_bytes(free)} free; make room or choose another disk"
    )


def format_plan(plan: Plan) -> str:
    """The plan as a few lines of text."""
    lines = [
        f"clips      {plan.clips}: {plan.done} stored, {plan.quarantined} in quarantine, {plan.todo} to do"
        + (f" ({counted(plan.without_video, 'has', 'have')} no video file)" if plan.without_video else ""),
        f"writes     {counted(plan.shards, 'shard')} in {counted(plan.files, 'file')}, "
        f"{format_bytes(plan.bytes_to_write)}"
        + (f"; {format_bytes(plan.bytes_free)} free" if plan.bytes_free is not None else ""),
    ]
    if plan.hours is not None and plan.seconds_per_clip is not None:
        lines.append(
            f"time       about {format_duration(plan.hours)}: {plan.seconds_per_clip:.3f} s a clip, measured on "
            f"{plan.probed}"
        )
    if line := bottleneck_line(plan.ceilings):
        lines.append(f"bound      {line.removeprefix('bound by ').removesuffix(ASK_PLAN)}")
    if plan.unrecorded:
        lines.append(f"note       {unrecorded_line(plan.unrecorded)}")
    lines += [f"advice     {line}" for line in plan.advice]
    return "\n".join(lines + [f"refused    {line}" for line in plan.refusals])


@dataclass(frozen=True)
class _StoredRows:
    """The data about the store that a plan needs; an open store holds far more for every clip.

    Attributes:
        origins: Origin of each committed clip, as in `Store.origins`.
        quarantined: Ids of the quarantined clips.
        waiting: Shard of every other clip that has a row.
        rows: Number of rows in the store.
    """

    origins: Mapping[str, Origin | None] = field(default_factory=dict)
    quarantined: Set[str] = frozenset()
    waiting: Mapping[str, int] = field(default_factory=dict)
    rows: int = 0


def _stored_rows(job: ExtractionJob) -> _StoredRows:
    """Read the store and close it again, because an open store and a data set are both large with millions of clips."""
    path = job.config.store.path
    if not store_exists(path):
        storage = storage_at(path)
        if ledger_journal(storage).read().lines:
            raise DamagedStore(
                f"{storage.location / HEADER} is missing, but the store has commits; run `egopatch features repair "
                f"{shlex.quote(str(storage.location))}`"
            )
        return _StoredRows()
    with open_store(path, expect=job.fingerprint) as store:
        return _StoredRows(
            origins=store.origins(),
            quarantined=frozenset(store.quarantine),
            waiting={clip_id: work.shard for work in store.missing_shards() for clip_id in work.ids},
            rows=len(store.planned_ids),
        )


def _shards(todo: Sequence[Clip], stored: _StoredRows, size: int) -> int:
    """Number of shards of `size` rows that contain the clips in `todo`; clips without a row get the next free rows."""
    new_rows = itertools.count(stored.rows)
    waiting = stored.waiting
    return len({waiting[c.clip_id] if c.clip_id in waiting else next(new_rows) // size for c in todo})


def _bytes_free(path: Path | str) -> int | None:
    location = parse_location(path)
    return free_bytes(location) if isinstance(location, Path) else None


def _probe(job: ExtractionJob, sample: list[Clip]) -> dict[str, float]:
    """Clips a second of decoding (by all children together), of the encoder, and of the disk where it was measured."""
    config = job.config
    decoders = decoder_count(config, worker_count(config))
    # The clips that are decoded ahead, those that are kept, and the current one.
    with job.open_decoders(decoders, 2 * decoders + len(sample) + 1) as pool:
        measured = measure_decoding(pool, sample, decoders)
    rates = {"decoding": (measured.decoded + measured.failed) / measured.seconds}
    # Each clip is encoded several times, so none is released.
    kept = [replace(clip, release=lambda: None) for clip in measured.first if isinstance(clip, PreparedClip)]
    if not kept:
        return rates
    with shortage_explained(config.encoder), job.open_batch_encoder() as encoder:
        for _ in range(encoder.slow_batches + 1):
            warm = encoder.seconds + encoder.handover_s
            for i in range(encoder.size):
                encoder.add(kept[i % len(kept)])
            encoder.start()()
    rates["encoder"] = encoder.size / (encoder.seconds + encoder.handover_s - warm)
    if (cost := measured_cost(config.store.path)) and cost.write_s:
        rates["disk"] = 1 / cost.write_s
    return rates
