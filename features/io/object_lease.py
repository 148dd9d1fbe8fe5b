"""Shard ownership in object storage: a lease is an object that names a process, which renews it while it runs.

Processes of other machines cannot be observed, so a lease expires once nobody has renewed it for a while. Its owner may
still be running: then two processes encode the same shard, and `features.state.commit` keeps the store correct.
"""

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from egopatch.features.io.bucket import Bucket, Content, Version
from egopatch.features.io.file_lease import parse_owner
from egopatch.features.io.process import Owner
from egopatch.features.values.errors import ShardOwned, StoreError, WriteConflict

RENEW_S = 15.0
EXPIRY_S = 60.0


@dataclass(frozen=True)
class LeaseState:
    """A lease as it was found: its owner, and the seconds since it was last renewed."""

    owner: Owner | None
    idle_s: float
    version: Version

    @property
    def holder(self) -> Owner | None:
        """The process that holds the lease; None once the owner has ended, or has not renewed it in time."""
        held = self.owner is not None and self.idle_s < EXPIRY_S and self.owner.may_be_alive()
        return self.owner if held else None


@contextmanager
def hold(bucket: Bucket, shard: int) -> Iterator[None]:
    """Hold the lease of `shard`, in the store at `bucket`. Errors as in `file_lease.hold`."""
    key = f"leases/{shard:08d}.json"
    # The random number tells this lease from every other one, including earlier ones of this process.
    content = json.dumps(asdict(Owner.this_process()) | {"number": uuid.uuid4().hex}).encode()
    version = _acquire(bucket, key, shard, content)
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(bucket, key, content, version, stop), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(StoreError, FileNotFoundError):  # a lease that cannot be removed expires
            if bucket.get(key).content == content:
                bucket.delete([key])


def require_no_writers(bucket: Bucket) -> None:
    """Refuse to continue while another process writes to the store. Errors as in `file_lease.require_no_writers`."""
    for key in sorted(bucket.listing("leases")):
        lease = _read_lease(bucket, key) if key.endswith(".json") else None
        if lease is not None and (holder := lease.holder) is not None:
            raise ShardOwned(
                f"{holder} is writing to the store (lease {bucket.url}/{key}); wait for that process, or stop it, and "
                "run the same command again"
            )


def remove(bucket: Bucket, shard: int | None = None) -> list[str]:
    """Remove expired leases. Arguments, result and errors as in `file_lease.remove`."""
    found = {
        key: lease
        for key in sorted(bucket.listing("leases"))
        if key.endswith(".json")
        and (shard is None or key.endswith(f"/{shard:08d}.json"))
        and (lease := _read_lease(bucket, key)) is not None
        and lease.owner is not None
    }
    for key, lease in found.items():
        if lease.holder is not None:
            raise ShardOwned(
                f"{bucket.url}/{key} is held by {lease.holder}, renewed {lease.idle_s:.0f} s ago; stop it first"
            )
    removed = []
    for key, lease in found.items():
        with suppress(WriteConflict):  # another process has taken it meanwhile
            # No request deletes an object on a condition, so an empty one remains, which the next owner replaces.
            bucket.put_if_unchanged(key, b"", lease.version)
            removed.append(f"{key.rpartition('/')[2]}: {lease.owner}")
    return removed


def _acquire(bucket: Bucket, key: str, shard: int, content: bytes) -> Version:
    lease = _read_lease(bucket, key)
    if lease is None or lease.holder is None:
        try:
            return bucket.put_if_unchanged(key, content, None if lease is None else lease.version)
        except WriteConflict:
            lease = _read_lease(bucket, key)  # another process took it first
    holder = "another process" if lease is None or lease.owner is None else str(lease.owner)
    raise ShardOwned(
        f"shard {shard} of {bucket.url} is held by {holder}; wait for that process, or stop it: its "
        f"lease then expires automatically, {EXPIRY_S:.0f} s after the last renewal"
    )


def _read_lease(bucket: Bucket, key: str) -> LeaseState | None:
    try:
        found = bucket.get(key)
    except FileNotFoundError:
        return None
    return LeaseState(parse_owner(found.content), _idle_s(bucket, found), found.version)


def _idle_s(bucket: Bucket, found: Content) -> float:
    """Seconds since an object was written, by the server's clock alone; the local clock may be wrong."""
    bucket.put("leases/clock", b"now")
    return (bucket.get("leases/clock").modified - found.modified).total_seconds()


def _renew(bucket: Bucket, key: str, content: bytes, version: Version, stop: threading.Event) -> None:
    while not stop.wait(RENEW_S):
        try:
            version = bucket.put_if_unchanged(key, content, version)
        except WriteConflict:
            return  # another process took the lease; the commit will fail with a conflict
        except StoreError:
            continue  # the network may come back before the lease expires
