"""Forecasts the time and space that a job of any size takes, from the measured cost of a smaller one."""

import math
from dataclasses import dataclass
from pathlib import Path

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.worker.job import resolve_job
from egopatch.extract.worker.job_stats import JobStats, jobs_path, read_jobs, stats_of
from egopatch.features import StoreSpec
from egopatch.features.common.units import counted, format_bytes
from egopatch.features.formats.registry import format_named
from egopatch.features.values.dtypes import spec_row_bytes


@dataclass(frozen=True)
class ClipCost:
    """Cost of one clip.

    Attributes:
        encode_s: Seconds of one GPU (or of one worker without a GPU).
        decode_s: Seconds of one core.
        write_s: Seconds of a worker's writing thread.
        source: Where the figures come from.
    """

    encode_s: float
    decode_s: float
    write_s: float
    source: str


@dataclass(frozen=True)
class Forecast:
    """A job of `clips` clips on `gpus` GPUs with `cores` cores beside each.

    Attributes:
        cost: Cost of one clip.
        bound_by: Slowest stage: encoding, decoding or writing.
        cores_to_keep_up: Cores per GPU with which decoding is not the slowest stage.
        shards, files, bytes_to_write: Size of the whole store.
        hours: Time from the first clip to the last, in whole shards per GPU; start-up and requeueing come on top.
        gpu_hours: Sum over all GPUs.
        clips_per_second: Sum over all GPUs.
        write_gb_s: Sum over all GPUs.
    """

    clips: int
    gpus: int
    cores: int
    cost: ClipCost
    bound_by: str
    cores_to_keep_up: int
    shards: int
    files: int
    bytes_to_write: int
    hours: float
    gpu_hours: float
    clips_per_second: float
    write_gb_s: float


def measured_cost(store: Path | str) -> ClipCost | None:
    """Mean cost over all jobs on `store` that were measured; None if there were none."""
    jobs = sum((stats_of(job) for job in read_jobs(store)), JobStats())
    clips, spent = jobs.timed, jobs.stages
    if not clips:
        return None
    return ClipCost(
        encode_s=(spent.busy_s or spent.encode_s) / clips,
        decode_s=spent.decode_s / clips,
        write_s=spent.write_s / clips,
        source=f"{counted(clips, 'clip')} in {jobs_path(store)}",
    )


def given_cost(clips_per_second: float, measured: ClipCost | None) -> ClipCost:
    """Encoding at the given rate; decoding and writing as measured, or zero if they were not measured.

    Raises:
        ConfigError: At that rate a clip takes no time, or forever.
    """
    if not 0 < 1 / clips_per_second < math.inf:
        raise ConfigError(
            f"--clips-per-second is {clips_per_second:g}; expected how many clips one GPU encodes in a second, such "
            "as 100"
        )
    decode_s, write_s = (measured.decode_s, measured.write_s) if measured else (0.0, 0.0)
    rest = f"; decoding and writing from {measured.source}" if measured else "; decoding and writing not counted"
    return ClipCost(1 / clips_per_second, decode_s, write_s, f"--clips-per-second {clips_per_second:g}{rest}")


def make_forecast(config: Config, clips: int, gpus: int, cores: int, clips_per_second: float | None) -> Forecast:
    """Forecast a job without its data: neither videos nor questions need to exist.

    Args:
        config: The experiment.
        clips, gpus: Size of the job.
        cores: Number of cores per GPU, for decoding.
        clips_per_second: Encoding rate of one GPU; None uses the rate measured by earlier jobs on the configured store.

    Raises:
        ConfigError: The given rate is out of range, or there is neither a measured rate nor a given one.
        CheckpointError: As `extract.run.extract_together`.
    """
    measured = measured_cost(config.store.path)
    if clips_per_second is not None:
        cost = given_cost(clips_per_second, measured)
    elif measured is not None:
        cost = measured
    else:
        raise ConfigError(
            f"--clips is {clips}, but no job on {config.store.path} has been measured; encode a few hundred clips first"
            " (egopatch extract run), or give one GPU's rate with --clips-per-second"
        )
    return forecast(clips, gpus, cores, resolve_job(config).spec, config.store.format, cost)


def forecast(clips: int, gpus: int, cores: int, spec: StoreSpec, format_name: str, cost: ClipCost) -> Forecast:
    """Spread `clips` over `gpus` with `cores` cores each, in whole shards; none of the numbers is below 1."""
    shards = math.ceil(clips / spec.shard)
    # The stages overlap, so the slowest one decides.
    stages = {"encoding": cost.encode_s, "decoding": cost.decode_s / cores, "writing": cost.write_s}
    bound_by = max(stages, key=stages.__getitem__)
    seconds = min(math.ceil(shards / gpus) * spec.shard, clips) * stages[bound_by]
    size = clips * spec_row_bytes(spec)
    return Forecast(
        clips=clips,
        gpus=gpus,
        cores=cores,
        cost=cost,
        bound_by=bound_by,
        cores_to_keep_up=math.ceil(cost.decode_s / max(cost.encode_s, cost.write_s)),
        shards=shards,
        files=shards * len(format_named(format_name).file_names(spec, 0)),
        bytes_to_write=size,
        hours=seconds / 3600,
        gpu_hours=gpus * seconds / 3600,
        clips_per_second=clips / seconds,
        write_gb_s=size / seconds / 1e9,
    )


def format_forecast(job: Forecast) -> str:
    """The forecast as a few lines of text."""
    cost = job.cost
    enough = f" ({counted(job.cores_to_keep_up, 'core keeps', 'cores keep')} up with a GPU)" if cost.decode_s else ""
    return "\n".join(
        [
            f"clips      {job.clips} on {counted(job.gpus, 'GPU')}, {counted(job.cores, 'core')} each: "
            f"{job.clips_per_second:.1f} a second",
            f"time       {format_duration(job.hours)}, {format_duration(job.gpu_hours)} of GPU time; "
            f"bound by {job.bound_by}{enough}",
            f"writes     {counted(job.shards, 'shard')} in {counted(job.files, 'file')}, "
            f"{format_bytes(job.bytes_to_write)}, {format_bytes(job.write_gb_s * 1e9)}/s",
            f"a clip     encoding {cost.encode_s:.4f} s, decoding {cost.decode_s:.4f} s, writing {cost.write_s:.4f} s;"
            f" from {cost.source}",
        ]
    )


def format_duration(hours: float) -> str:
    """A duration with the unit that suits it, such as `2.5 h`, `14.1 min` or `36 s`."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.2g} s"
