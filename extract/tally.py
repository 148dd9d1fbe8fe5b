"""What a job did and where its time went."""

import dataclasses
import json
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Stages:
    """Seconds, added up over the workers.

    Attributes:
        total_s: from the start of the decoders to the last commit.
        start_s: until the first clip was decoded; the children start in it.
        decode_s: of the children, beside the encoder.
        wait_decode_s: for which the encoder waited for later clips.
        encode_s: on the device.
        write_s: of the store's thread, beside the encoder.
        wait_write_s: for which the encoder waited for the disk.
    """

    total_s: float = 0.0
    start_s: float = 0.0
    decode_s: float = 0.0
    wait_decode_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    wait_write_s: float = 0.0

    def __add__(self, other: "Stages") -> "Stages":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Stages(*(a + b for a, b in zip(mine, others, strict=True)))

    def __str__(self) -> str:
        def share(seconds: float) -> str:
            return f"{seconds / max(self.total_s, 1e-9):.1%}"

        return (
            f"of {self.total_s:.1f} s: encoding {share(self.encode_s)}, starting {share(self.start_s)}, waiting for"
            f" decoders {share(self.wait_decode_s)}, for the disk {share(self.wait_write_s)};"
            f" beside it decoding {self.decode_s:.1f} s, writing {self.write_s:.1f} s"
        )


@dataclass(frozen=True)
class Tally:
    """What a worker did: clips committed and quarantined, shards left to another owner (one line each), and time."""

    committed: int = 0
    quarantined: int = 0
    skipped: tuple[str, ...] = ()
    stages: Stages = field(default_factory=Stages)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.committed + other.committed,
            self.quarantined + other.quarantined,
            self.skipped + other.skipped,
            self.stages + other.stages,
        )


def jobs_path(store: Path) -> Path:
    """The file of JSON lines beside a store that says what each job on it did."""
    return store.with_name(store.name + ".jobs.jsonl")


def record_job(store: Path, tally: Tally, workers: int) -> None:
    """Add one line to the store's `jobs_path`."""
    line = {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "workers": workers,
        "committed": tally.committed,
        "quarantined": tally.quarantined,
        "skipped": list(tally.skipped),
        "stages": {name: round(seconds, 3) for name, seconds in dataclasses.asdict(tally.stages).items()},
    }
    with jobs_path(store).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
