"""Ownership on a file system: a lease is a file that names a process and that the process keeps locked.

The kernel drops the lock when the process ends, so no clock, process number or container can make a living owner look
dead. If other machines may use the same file system, and may not see each other's locks, an unlocked lease of another
boot is kept, because its owner may be running. `remove` removes such a lease.
"""

import fcntl
import json
import os
import shlex
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from egopatch.features.common.disk import file_system_of
from egopatch.features.io.files import is_file_of, lock_file, locked, make_folder, write_errors_explained
from egopatch.features.io.process import Owner, this_boot
from egopatch.features.values.errors import ShardOwned

# File systems that only one kernel can have mounted.
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay", "apfs", "hfs"}


def lease_path(root: Path, shard: int) -> Path:
    """The lease file of `shard`."""
    return root / "leases" / f"{shard:08d}.json"


def parse_owner(content: bytes) -> Owner | None:
    """The owner that the content of a lease names; None where a crash left it unfinished."""
    try:
        return Owner.from_json(json.loads(content))
    except (ValueError, RecursionError):
        return None


def holder(path: Path) -> Owner | None:
    """The process that holds a lease; None where there is no lease, or it has expired."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        owner = parse_owner(os.pread(handle, 1 << 16, 0))
        if _is_locked(handle, path):
            return owner or Owner("this machine or another", "", 0, 0, 0)
        if owner is None or owner.boot == this_boot() or _is_local(path):
            return None
        return owner
    finally:
        os.close(handle)


@contextmanager
def hold(root: Path, shard: int, name: str | None = None) -> Iterator[None]:
    """Hold the lease of `shard`, in the store at `root`, for the length of a block.

    Args:
        root: Folder of the store, or of a training run, whose only lease is number 0.
        shard: The shard.
        name: What is held, for messages; the default names shard and store.

    Raises:
        ShardOwned: Another process holds it; the message names host and process.
    """
    path = lease_path(root, shard)
    name = f"shard {shard} of {root}" if name is None else name
    with write_errors_explained(f"taking the lease of {name}"):
        handle = _acquire(root, path, name)
    try:
        yield
    finally:
        if is_file_of(handle, path):
            path.unlink(missing_ok=True)
        os.close(handle)


def describe(name: str, root: Path, owner: Owner) -> str:
    """Who holds `name`, in the store or run at `root`, and what to do about it."""
    return f"{name} is held by {owner}; {_advice(root, owner)}"


def require_no_writers(root: Path) -> None:
    """Refuse to continue while another process writes to the store at `root`.

    Raises:
        ShardOwned: A shard is held; the message names its lease, host and process.
    """
    for path in sorted((root / "leases").glob("*.json")):
        owner = holder(path)
        if owner is not None:
            raise ShardOwned(
                f"{owner} is writing to {root} (lease {path}); {_advice(root, owner)}, and run the same command again"
            )


def remove(root: Path, shard: int | None = None) -> list[str]:
    """Remove the leases of one shard, or of all, whose owners do not keep them locked; returns one line for each.

    Raises:
        ShardOwned: A running process keeps one of them locked; none was removed.
    """
    folder = root / "leases"
    if not folder.is_dir():
        return []
    with locked(folder / "lock"):
        owners: dict[Path, Owner | None] = {}
        for path in sorted(folder.glob("*.json") if shard is None else [lease_path(root, shard)]):
            with suppress(FileNotFoundError), path.open("rb") as file:  # its owner may release it in between
                owners[path] = parse_owner(file.read())
                if _is_locked(file.fileno(), path):
                    raise ShardOwned(
                        f"{path} is held by {owners[path] or 'a process'}, which is running; stop it first"
                    )
        removed = []
        for path, owner in owners.items():
            with suppress(FileNotFoundError):
                path.unlink()
                removed.append(f"{path.name}: {owner or 'unfinished'}")
    return removed


def _acquire(root: Path, path: Path, name: str) -> int:
    """Take the lease; returns the handle that keeps it locked."""
    make_folder(path.parent)
    # Under the lock, checking the owner and taking the lease are one step, so two processes cannot both take an
    # expired lease.
    with locked(path.parent / "lock"):
        owner = holder(path)
        if owner is not None:
            raise ShardOwned(describe(name, root, owner))
        for unfinished in path.parent.glob(f"{path.name}.*"):
            unfinished.unlink()
        new = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        handle = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            lock_file(handle, fcntl.LOCK_EX, new)
            os.write(handle, json.dumps(asdict(Owner.this_process())).encode())
            new.replace(path)  # so that no process sees a lease before it is locked
        except BaseException:
            new.unlink(missing_ok=True)
            os.close(handle)
            raise
        return handle


def _advice(root: Path, owner: Owner) -> str:
    if owner.boot == this_boot():
        return "wait for that process, or stop it: its lease then expires automatically"
    return (
        "wait for that process; if its machine is gone, or was restarted since, run `egopatch features unlock "
        f"{shlex.quote(str(root))}`"
    )


def _is_locked(handle: int, path: Path) -> bool:
    try:
        lock_file(handle, fcntl.LOCK_SH | fcntl.LOCK_NB, path)
    except BlockingIOError:
        return True
    fcntl.flock(handle, fcntl.LOCK_UN)
    return False


def _is_local(path: Path) -> bool:
    """Whether only this kernel can have the file system of `path` mounted."""
    found = file_system_of(path)
    return found is not None and found.kind in _LOCAL
