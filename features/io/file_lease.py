"""Who owns a shard: a lease is a file that names a process. An owner that died on this machine loses it by itself."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from egopatch.features.io.fields import take, take_count
from egopatch.features.io.files import disk_full_is_clear, locked, make_folder
from egopatch.features.values.errors import ShardOwned

_CLOCK_SLACK_S = 2.0  # start times are derived from the boot time, which clock corrections move a little


@dataclass(frozen=True)
class Owner:
    """A process: `started` is its start time in seconds since the epoch, since process numbers are used again."""

    host: str
    pid: int
    started: float

    @classmethod
    def myself(cls) -> "Owner":
        """This process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def may_live(self) -> bool:
        """False only where it is certain that the process is gone. Another machine's processes cannot be seen."""
        if self.host != socket.gethostname():
            return True
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) <= _CLOCK_SLACK_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def lease_path(root: Path, shard: int) -> Path:
    """The file that says who owns `shard`."""
    return root / "leases" / f"{shard:08d}.json"


def owner_of(path: Path) -> Owner | None:
    """The owner that a lease names; None where there is no lease, or one that a crash left unfinished."""
    try:
        return parse_owner(path.read_bytes())
    except FileNotFoundError:
        return None


def parse_owner(content: bytes) -> Owner | None:
    """The owner that the content of a lease names; None where a crash left it unfinished."""
    try:
        record = json.loads(content)
        return Owner(take(record, "host", str), take_count(record, "pid"), take(record, "started", float))
    except (ValueError, RecursionError):
        return None


@contextmanager
def hold(root: Path, shard: int) -> Iterator[None]:
    """Own `shard` of the store at `root` for a while.

    Raises:
        ShardOwned: another process has it; the message names host and process.
    """
    path = lease_path(root, shard)
    with disk_full_is_clear(f"taking the lease of shard {shard} of {root}"):
        _take(root, shard, path)
    try:
        yield
    finally:
        if owner_of(path) == Owner.myself():
            path.unlink(missing_ok=True)


def _take(root: Path, shard: int, path: Path) -> None:
    make_folder(path.parent)
    # The lock makes "look who owns it, then take it" one step, so two heirs of a dead owner cannot both inherit.
    with locked(path.parent / "lock"):
        owner = owner_of(path)
        if owner is not None and owner.may_live():
            raise ShardOwned(
                f"shard {shard} of {root} is owned by process {owner.pid} on {owner.host}; let it finish, or end it: "
                f"the lease of a dead process lapses by itself (after a crash of {owner.host}, remove {path})"
            )
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.write(handle, json.dumps(asdict(Owner.myself())).encode())
        finally:
            os.close(handle)


def require_none(root: Path) -> None:
    """Refuse to go on while anybody writes to the store at `root`.

    Raises:
        ShardOwned: names the shard's lease, host and process.
    """
    for path in sorted((root / "leases").glob("*.json")):
        owner = owner_of(path)
        if owner is not None and owner.may_live():
            raise ShardOwned(
                f"{path} says that process {owner.pid} on {owner.host} is writing to {root}; let it finish, or end it, "
                "and run the same command again"
            )
