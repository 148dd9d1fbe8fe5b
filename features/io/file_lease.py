"""Shard ownership on a file system: a lease is a file that names a process, and expires once that process has ended."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from egopatch.features.io.fields import get_count, get_field
from egopatch.features.io.files import disk_full_explained, locked, make_folder
from egopatch.features.values.errors import ShardOwned

_CLOCK_SLACK_S = 2.0  # start times are derived from the boot time, which clock corrections move a little


@dataclass(frozen=True)
class Owner:
    """A process. `started` is its start time in seconds since the epoch, because process numbers are reused."""

    host: str
    pid: int
    started: float

    @classmethod
    def this_process(cls) -> "Owner":
        """The owner that stands for this process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def may_be_alive(self) -> bool:
        """False only where the process has certainly ended. Processes of other machines are out of sight."""
        if self.host != socket.gethostname():
            return True
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) <= _CLOCK_SLACK_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def lease_path(root: Path, shard: int) -> Path:
    """The lease file of `shard`."""
    return root / "leases" / f"{shard:08d}.json"


def read_owner(path: Path) -> Owner | None:
    """The owner that a lease names; None where there is no lease, or a crash left the file unfinished."""
    try:
        return parse_owner(path.read_bytes())
    except FileNotFoundError:
        return None


def parse_owner(content: bytes) -> Owner | None:
    """The owner that the content of a lease names; None where a crash left it unfinished."""
    try:
        record = json.loads(content)
        return Owner(get_field(record, "host", str), get_count(record, "pid"), get_field(record, "started", float))
    except (ValueError, RecursionError):
        return None


def holder(path: Path) -> Owner | None:
    """The process that holds a lease; None where there is no lease, or it has expired."""
    owner = read_owner(path)
    return owner if owner is not None and owner.may_be_alive() else None


@contextmanager
def hold(root: Path, shard: int) -> Iterator[None]:
    """Hold the lease of `shard`, in the store at `root`, for the length of a block.

    Raises:
        ShardOwned: Another process holds it; the message names host and process.
    """
    path = lease_path(root, shard)
    with disk_full_explained(f"taking the lease of shard {shard} of {root}"):
        _acquire(root, shard, path)
    try:
        yield
    finally:
        if read_owner(path) == Owner.this_process():
            path.unlink(missing_ok=True)


def _acquire(root: Path, shard: int, path: Path) -> None:
    make_folder(path.parent)
    # Under the lock, checking the owner and taking the lease are one step, so two processes cannot both take an
    # expired lease.
    with locked(path.parent / "lock"):
        owner = holder(path)
        if owner is not None:
            raise ShardOwned(
                f"shard {shard} of {root} is held by {owner}; wait for that process, or stop it: its lease then "
                f"expires automatically (after a crash of {owner.host}, remove {path})"
            )
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(handle, json.dumps(asdict(Owner.this_process())).encode())
        finally:
            os.close(handle)


def require_no_writers(root: Path) -> None:
    """Refuse to continue while another process writes to the store at `root`.

    Raises:
        ShardOwned: A shard is held; the message names its lease, host and process.
    """
    for path in sorted((root / "leases").glob("*.json")):
        owner = holder(path)
        if owner is not None:
            raise ShardOwned(
                f"{owner} is writing to {root} (lease {path}); wait for that process, or stop it, and run the same "
                "command again"
            )
