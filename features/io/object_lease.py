"""Leases in object storage: an object that names a process, which writes it again and again for as long as it lives.

Another machine's processes cannot be seen, so a lease that nobody has renewed for a while is taken from its owner.
That may be wrong, and then two encode the same shard; what they write never depends on it, see `features.state.commit`.
"""

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from egopatch.features.io.bucket import Bucket, Content, Version
from egopatch.features.io.file_lease import Owner, parse_owner
from egopatch.features.values.errors import Overtaken, ShardOwned, StoreError

RENEW_S = 15.0
LAPSE_S = 60.0


@dataclass(frozen=True)
class Held:
    """A lease as it was found: whose, and for how long it has not been renewed."""

    owner: Owner | None
    idle_s: float
    version: Version

    def may_live(self) -> bool:
        """False where the owner is gone, or has been silent for too long."""
        return self.owner is not None and self.idle_s < LAPSE_S and self.owner.may_live()


@contextmanager
def hold(bucket: Bucket, base: str, shard: int) -> Iterator[None]:
    """Own `shard` of the store whose keys begin with `base` for a while. Errors as in `features.io.file_lease.hold`."""
    key = f"{base}leases/{shard:08d}.json"
    # The number makes it differ from every other lease, also from this process's own on another occasion.
    content = json.dumps(asdict(Owner.myself()) | {"number": uuid.uuid4().hex}).encode()
    version = _take(bucket, base, key, shard, content)
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(bucket, key, content, version, stop), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(StoreError, FileNotFoundError):  # it lapses by itself
            found = bucket.get(key)
            if found is not None and found.content == content:
                bucket.delete([key])


def require_none(bucket: Bucket, base: str) -> None:
    """Refuse to go on while anybody writes to the store. Errors as in `features.io.file_lease.require_none`."""
    for key in sorted(bucket.listing(f"{base}leases")):
        held = _look(bucket, base, key) if key.endswith(".json") else None
        if held is not None and held.owner is not None and held.may_live():
            raise ShardOwned(
                f"{bucket.url}/{key} says that process {held.owner.pid} on {held.owner.host} is writing; let it "
                "finish, or end it, and run the same command again"
            )


def _take(bucket: Bucket, base: str, key: str, shard: int, content: bytes) -> Version:
    held = _look(bucket, base, key)
    if held is None or not held.may_live():
        try:
            return bucket.put_over(key, content, None if held is None else held.version)
        except Overtaken:
            held = _look(bucket, base, key)  # another heir was faster
    owner = (
        "another process" if held is None or held.owner is None else f"process {held.owner.pid} on {held.owner.host}"
    )
    raise ShardOwned(
        f"shard {shard} of {bucket.url}/{base.rstrip('/')} is owned by {owner}; let it finish, or end it: the lease "
        f"of a dead process lapses by itself, {LAPSE_S:.0f} s after it was last renewed"
    )


def _look(bucket: Bucket, base: str, key: str) -> Held | None:
    try:
        found = bucket.get(key)
    except FileNotFoundError:
        return None
    assert found is not None
    owner = parse_owner(found.content)
    return Held(owner, _idle_s(bucket, base, found), found.version)


def _idle_s(bucket: Bucket, base: str, found: Content) -> float:
    """Seconds since an object was written, by the server's clock alone: ours may be wrong."""
    clock = f"{base}leases/clock"
    bucket.put(clock, b"now")
    now = bucket.get(clock)
    assert now is not None
    return (now.modified - found.modified).total_seconds()


def _renew(bucket: Bucket, key: str, content: bytes, version: Version, stop: threading.Event) -> None:
    while not stop.wait(RENEW_S):
        try:
            version = bucket.put_over(key, content, version)
        except Overtaken:
            return  # it was taken away; the commit will find out
        except StoreError:
            continue  # the network may come back before the lease lapses
