"""What a job of any size would take, from what a smaller one was measured to cost."""

import math
from dataclasses import dataclass
from pathlib import Path

from egopatch.configs.schema import ConfigError
from egopatch.extract.worker.job_stats import Stages, jobs_path, read_jobs
from egopatch.features import StoreSpec
from egopatch.features.formats.registry import format_named
from egopatch.features.values.dtypes import row_bytes


@dataclass(frozen=True)
class ClipCost:
    """What one clip costs.

    Attributes:
        encode_s: seconds of one GPU (or of one worker without).
        decode_s: seconds of one core.
        write_s: seconds of a worker's writing thread.
        source: where the figures come from.
    """

    encode_s: float
    decode_s: float
    write_s: float
    source: str


@dataclass(frozen=True)
class Forecast:
    """A job of `clips` clips on `gpus` GPUs with `cores` cores beside each.

    Attributes:
        cost: of a clip.
        bound_by: the stage that the others wait for: encoding, decoding or writing.
        cores_to_keep_up: beside each GPU, for which decoding is no longer that stage.
        shards, files, bytes_to_write: of the whole store.
        hours: from the first clip to the last, in whole shards a GPU; what is started up or requeued comes on top.
        gpu_hours: of all GPUs together.
        clips_per_second: of all GPUs together.
        write_gb_s: that all GPUs together write.
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
    """The mean over the jobs that `store` has seen; None where there were none."""
    jobs = read_jobs(store)
    clips = sum(job["committed"] for job in jobs)
    if not clips:
        return None
    spent = sum((Stages(**job["stages"]) for job in jobs), Stages())
    return ClipCost(
        encode_s=spent.encode_s / clips,
        decode_s=spent.decode_s / clips,
        write_s=spent.write_s / clips,
        source=f"{clips} clips in {jobs_path(store)}",
    )


def given_cost(clips_per_second: float, measured: ClipCost | None) -> ClipCost:
    """A GPU's rate as the user says; decoding and writing as measured, or nothing where they were not."""
    decode_s, write_s = (measured.decode_s, measured.write_s) if measured else (0.0, 0.0)
    beside = f"; decoding and writing from {measured.source}" if measured else "; decoding and writing not counted"
    return ClipCost(1 / clips_per_second, decode_s, write_s, f"--clips-per-second {clips_per_second:g}{beside}")


def forecast(clips: int, gpus: int, cores: int, spec: StoreSpec, format_name: str, cost: ClipCost) -> Forecast:
    """Spread `clips` over `gpus`, in whole shards.

    Raises:
        ConfigError: `clips`, `gpus` or `cores` is below 1.
    """
    for option, value in (("--clips", clips), ("--gpus", gpus), ("--cores", cores)):
        if value < 1:
            raise ConfigError(f"{option} is {value}; expected at least 1")
    shards = math.ceil(clips / spec.shard)
    # The stages overlap, so the slowest one decides.
    stages = {"encoding": cost.encode_s, "decoding": cost.decode_s / cores, "writing": cost.write_s}
    bound_by = max(stages, key=stages.__getitem__)
    seconds = min(math.ceil(shards / gpus) * spec.shard, clips) * stages[bound_by]
    size = clips * sum(row_bytes(array) for array in spec.arrays)
    return Forecast(
        clips=clips,
        gpus=gpus,
        cores=cores,
        cost=cost,
        bound_by=bound_by,
        cores_to_keep_up=math.ceil(cost.decode_s / max(cost.encode_s, cost.write_s)),
        shards=shards,
        files=shards * len(format_named(format_name).files(spec, 0)),
        bytes_to_write=size,
        hours=seconds / 3600,
        gpu_hours=gpus * seconds / 3600,
        clips_per_second=clips / seconds,
        write_gb_s=size / seconds / 1e9,
    )


def describe(found: Forecast) -> str:
    """The forecast in a few lines."""
    cost = found.cost
    return "\n".join(
        [
            f"clips      {found.clips} on {found.gpus} GPUs, {found.cores} cores each:"
            f" {found.clips_per_second:.1f} a second",
            f"time       {found.hours:.1f} h, {found.gpu_hours:.0f} GPU hours; bound by {found.bound_by}"
            f" ({found.cores_to_keep_up} cores keep up with a GPU)",
            f"writes     {found.shards} shards in {found.files} files, {found.bytes_to_write / 1e12:.2f} TB,"
            f" {found.write_gb_s:.2f} GB/s",
            f"a clip     encoding {cost.encode_s:.4f} s, decoding {cost.decode_s:.4f} s, writing {cost.write_s:.4f} s;"
            f" from {cost.source}",
        ]
    )
