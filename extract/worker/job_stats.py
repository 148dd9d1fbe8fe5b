"""Statistics of a job: how many clips it committed and how long each stage took."""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from egopatch.configs.schema import Config
from egopatch.features.storage.interface import Journal
from egopatch.features.storage.pick import storage_at
from egopatch.features.values.location import Location, parse_location

_JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class Stages:
    """Seconds spent in each stage, summed over the workers.

    Attributes:
        total_s: Time from the start of the decoders to the last commit.
        start_s: Time until the first clip was decoded, including the start of the child processes.
        decode_s: Decoding time of all children, in parallel with the encoder, without that of clips that failed.
        wait_decode_s: Time for which the encoder waited for clips after the first.
        encode_s: Time that the worker's main thread spent on starting batches and on waiting for them.
        write_s: Writing time of the store's thread, in parallel with the encoder.
        wait_write_s: Time for which the encoder waited for the disk.
        decoders_s: Decoding time of all children, also of clips that failed, divided by the number of children.
        handover_s: Time that the worker's main thread spent on taking frames from the children.
        busy_s: Time for which the encoder computed, as `BatchEncoder.busy_s`; more than `encode_s` if it did so while
            the main thread waited for something else, such as another encoder of the same job.
    """

    total_s: float = 0.0
    start_s: float = 0.0
    decode_s: float = 0.0
    wait_decode_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    wait_write_s: float = 0.0
    decoders_s: float = 0.0
    handover_s: float = 0.0
    busy_s: float = 0.0

    @property
    def starting(self) -> float:
        """Share of the time that passed before the first clip was decoded."""
        return self.start_s / max(self.total_s, 1e-9)

    def __add__(self, other: "Stages") -> "Stages":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Stages(*(a + b for a, b in zip(mine, others, strict=True)))

    def __str__(self) -> str:
        def share(seconds: float) -> str:
            return f"{seconds / max(self.total_s, 1e-9):.1%}"

        return (
            f"of {self.total_s:.1f} s: starting {self.starting:.1%}, waiting for the encoder"
            f" {share(self.encode_s)}, for decoders {share(self.wait_decode_s)}, for the disk"
            f" {share(self.wait_write_s)}; in parallel: decoding {self.decode_s:.1f} s,"
            f" encoding {self.busy_s:.1f} s, writing {self.write_s:.1f} s"
        )


@dataclass(frozen=True)
class JobStats:
    """Statistics of one worker, or the sum over several.

    Attributes:
        committed: Number of clips committed.
        quarantined: Number of clips quarantined.
        skipped: One line for each shard that another process holds.
        stages: Seconds spent in each stage.
        untimed: Number of clips committed by workers that died, whose time is therefore not in `stages`.
        cut_short: Id of each encoded clip that ends clearly later than its video -> by how many seconds.
    """

    committed: int = 0
    quarantined: int = 0
    skipped: tuple[str, ...] = ()
    stages: Stages = field(default_factory=Stages)
    untimed: int = 0
    cut_short: Mapping[str, float] = field(default_factory=dict)

    @property
    def timed(self) -> int:
        """Number of committed clips whose time is in `stages`: what a rate is computed from."""
        return self.committed - self.untimed

    def __add__(self, other: "JobStats") -> "JobStats":
        return JobStats(
            self.committed + other.committed,
            self.quarantined + other.quarantined,
            self.skipped + other.skipped,
            self.stages + other.stages,
            self.untimed + other.untimed,
            {**self.cut_short, **other.cut_short},
        )


def stats_of(job: dict[str, Any]) -> JobStats:
    """The statistics in a line of `read_jobs`; numbers that an earlier version did not record are 0."""
    stages, untimed = Stages(**job["stages"]), job.get("untimed", 0)
    return JobStats(job["committed"], job["quarantined"], tuple(job["skipped"]), stages, untimed)


def jobs_path(store: Path | str) -> Location:
    """The journal of jobs, a JSON line each: a file beside the store; in object storage, an object inside it."""
    location = parse_location(store)
    return location.with_name(location.name + ".jobs.jsonl") if isinstance(location, Path) else location / _JOBS


def record_job(config: Config, stats: JobStats) -> None:
    """Append one line to the `jobs_path` of `store.path`."""
    line = {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "engine": config.engine.name,
        "workers": config.engine.workers,
        "decoder": config.video.decoder,
        "committed": stats.committed,
        "untimed": stats.untimed,
        "quarantined": stats.quarantined,
        "skipped": list(stats.skipped),
        "stages": {name: round(seconds, 3) for name, seconds in dataclasses.asdict(stats.stages).items()},
    }
    path = jobs_path(config.store.path)
    if isinstance(path, Path):
        with path.open("a+b") as file:
            torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
    else:
        _jobs_journal(config.store.path).append(line)


def read_jobs(store: Path | str) -> list[dict[str, Any]]:
    """The lines that `record_job` wrote; those that a full disk or a crash cut short are skipped."""
    path = jobs_path(store)
    if not isinstance(path, Path):
        return [line.entry for line in _jobs_journal(store).read().lines]
    jobs = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            jobs.append(json.loads(line))
    return jobs


def _jobs_journal(store: Path | str) -> Journal[dict[str, Any]]:
    return storage_at(store).journal(_JOBS, dict)
