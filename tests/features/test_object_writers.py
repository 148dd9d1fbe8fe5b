"""Many writers in object storage: they share work, take over leases, conflict with each other, and lose nothing."""

import http.client
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from egopatch.features import Failure, ShardOwned, create_store, open_store
from egopatch.features.io import object_lease
from egopatch.features.io.bucket import Bucket
from egopatch.features.io.files import size_and_crc
from egopatch.features.io.process import Owner
from egopatch.features.state.ledger import ledger_journal
from egopatch.features.storage.objects import ObjectStorage
from egopatch.features.storage.pick import storage_at
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import verify
from egopatch.features.values.errors import WriteConflict
from egopatch.features.values.location import ObjectUrl
from tests.extract.fetch.loopback import Answer, answering
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip
from tests.features.objects import objects
from tests.features.test_objects import GONE, Killed


def test_a_second_writer_is_told_which_process_holds_the_shard(bucket: str) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    other = open_store(store.path)
    with (
        store.lease(0),
        pytest.raises(ShardOwned, match=f"shard 0 of {bucket}.* is held by process {os.getpid()} on "),
    ):
        other.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "x"})
    other.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "x"})
    assert not any("leases/0" in key for key in objects(bucket))


def test_a_silent_owner_on_another_machine_loses_its_lease(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "this_process", classmethod(lambda cls: Owner("another-host", "another boot", 1, 7, 0)))
        held = store.lease(0)
        held.__enter__()
    with pytest.raises(ShardOwned, match="held by process 7 on another-host"), store.lease(0):
        pass
    with pytest.raises(ShardOwned, match="process 7 on another-host is writing"):
        repair(store.path)
    monkeypatch.setattr("egopatch.features.io.object_lease.EXPIRY_S", 0.0)
    with store.lease(0):
        pass
    held.__exit__(None, None, None)


def test_a_lease_is_renewed_while_it_is_held(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egopatch.features.io.object_lease.RENEW_S", 0.1)
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    modified = Bucket(ObjectUrl(f"{bucket}/store"))
    with store.lease(0):
        first = modified.get("leases/00000000.json")
        renewed = threading.Event()
        for _ in range(40):
            renewed.wait(0.1)
            now = modified.get("leases/00000000.json")
            assert first is not None
            assert now is not None
            assert now.content == first.content
            if now.modified > first.modified:
                return
    raise AssertionError("nobody renewed it")


def others_write(
    monkeypatch: pytest.MonkeyPatch, moment: str, write: Callable[[], None], before: bool, every: bool = False
) -> None:
    """Have another writer take the lease away and `write`, before or after a call of ObjectStorage.`moment`."""
    real, busy = getattr(ObjectStorage, moment), iter(itertools.repeat(True) if every else [True])
    inside = threading.local()

    def wrapped(self: ObjectStorage, *args: Any) -> Any:
        def other() -> None:
            if not getattr(inside, "now", False) and next(busy, False):
                inside.now = True
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("egopatch.features.io.object_lease.EXPIRY_S", -1.0)
                    write()
                inside.now = False

        if before:
            other()
        done = real(self, *args)
        if not before:
            other()
        return done

    monkeypatch.setattr(ObjectStorage, moment, wrapped)


@pytest.mark.parametrize(("moment", "before"), [("publish", True), ("publish", False), ("write_ids", False)])
def test_two_writers_of_one_shard_lose_nothing(
    bucket: str, monkeypatch: pytest.MonkeyPatch, moment: str, before: bool
) -> None:
    """The other writer steps in before the upload, between upload and commit, or before leftovers are removed."""
    first = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    second = open_store(first.path)

    def write_as_another() -> None:
        second.write_shard(0, {name: clip(50) for name in IDS[1:3]}, dict.fromkeys(IDS, "second"))

    others_write(monkeypatch, moment, write_as_another, before)
    first.write_shard(0, {name: clip(7) for name in IDS[:2]}, dict.fromkeys(IDS, "first"))
    store = open_store(first.path)
    assert store.clip_ids == first.clip_ids == IDS[:3]
    assert verify(store.path).ok
    sources = store.sources(IDS[:3])
    assert (sources[IDS[0]], sources[IDS[2]]) == ("first", "second")
    for name in IDS[:3]:
        seed = 7 if sources[name] == "first" else 50
        assert torch.equal(store.read([name]).patches[0], clip(seed)["patches"].half())
    assert storage_at(store.path).write_ids(0) == {store.catalog.ledger.write_id(0)}


def test_an_owner_judged_dead_cannot_commit_files_already_removed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writer finds the upload of the first, which is about to be committed, and removes it as a leftover."""
    first = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    second = open_store(first.path)
    others_write(
        monkeypatch,
        "publish",
        lambda: second.write_shard(0, {}, {}, {IDS[3]: Failure("no")}) or second._writer.clear_leftovers(0),
        before=False,
    )
    first.write_shard(0, {name: clip(7) for name in IDS[:2]}, dict.fromkeys(IDS, "first"))
    assert verify(first.path).ok
    assert open_store(first.path).clip_ids == IDS[:2]
    check = open_store(first.path).read(IDS[:2])
    assert torch.equal(check.patches[1], clip(7)["patches"].half())


def test_rows_committed_during_cleanup_of_leftovers_are_kept(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    second = open_store(first.path)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStorage, "publish", kill_after(ObjectStorage.publish))
        with pytest.raises(Killed):
            first.write_shard(0, {IDS[3]: clip(3)}, {IDS[3]: "x"})

    def write_as_another() -> None:
        second.write_shard(0, {IDS[0]: clip(50)}, {IDS[0]: "second"})

    others_write(monkeypatch, "discard", write_as_another, before=False)
    first.write_shard(0, {name: clip(7) for name in IDS[:2]}, dict.fromkeys(IDS, "first"))
    assert open_store(first.path).sources(IDS[:2]) == {IDS[0]: "second", IDS[1]: "first"}
    assert torch.equal(first.read([IDS[0]]).patches[0], clip(50)["patches"].half())
    assert verify(first.path).ok


def kill_after(operation: Callable) -> Callable:
    def wrapped(*args: Any) -> Any:
        operation(*args)
        raise Killed

    return wrapped


def test_repeated_write_conflicts_end_in_a_clear_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    storage = storage_at(store.path)
    note = {"kind": "announce", "shard": 0, "files": {}}
    others_write(monkeypatch, "publish", lambda: ledger_journal(storage).append(note), before=False, every=True)
    with pytest.raises(WriteConflict, match=r"another process has written ledger/00000000.jsonl in the meantime"):
        store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "x"})
    assert open_store(store.path).clip_ids == ()


def test_a_commit_with_a_lost_response_counts_as_committed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server wrote the record, its answer got lost, and the client's second try met what the first had done."""
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    real = Bucket.put_if_unchanged

    def lossy(self: Bucket, key: str, content: bytes, version: Any) -> Any:
        done = real(self, key, content, version)
        if "ledger/" in key and b"commit" in content:
            raise WriteConflict("refused")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put_if_unchanged", lossy)
        store.write_shard(0, {name: clip(7) for name in IDS[:2]}, dict.fromkeys(IDS, "x"))
    assert store.clip_ids == IDS[:2]
    assert verify(store.path).ok


def forwarded(asked: Any, server: str) -> tuple[http.client.HTTPResponse, bytes]:
    """The server's answer to a request, and its body."""
    to = http.client.HTTPConnection(server.removeprefix("http://"))
    to.request(asked.command, asked.path, asked.content, dict(asked.headers))
    answer = to.getresponse()
    return answer, answer.read()


@pytest.fixture(params=["broken off", "500"])
def losing(environment: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The server does what it is asked for, but answers with an error, or not at all, to requests for these objects.

    Of each request, the first answer is lost; a request that is sent again is answered.
    """
    lost: list[str] = []
    sent: set[str] = set()

    def forward(asked: Any) -> Answer:
        answer, body = forwarded(asked, environment)
        again = f"{asked.command} {asked.path} {asked.content.decode('latin-1')}"
        if asked.command in ("PUT", "POST") and again not in sent and any(name in again for name in lost):
            sent.add(again)
            if request.param == "broken off":
                raise ConnectionAbortedError
            return 500, b"<Error><Code>InternalError</Code></Error>", {}
        return answer.status, body, dict(answer.getheaders())

    with answering(forward) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link)
        yield lost


def test_nothing_is_done_twice_if_an_answer_is_lost(bucket: str, losing: list[str]) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    at = Bucket(ObjectUrl(f"{bucket}/store"))
    losing += ["quarantine", "ledger", "leases/0"]
    with store.lease(0):
        store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "x"}, {IDS[1]: Failure("broken")})
    store.rewrite_shard(0, without=[IDS[0]])
    assert store.quarantine[IDS[1]].attempts == 1
    assert not [key for key in at.listing("leases") if "leases/0" in key]
    lines = [line.entry for line in ledger_journal(storage_at(store.path)).read().lines]
    assert len(lines) == 2


def test_an_upload_whose_last_answer_is_lost_is_made_again(
    bucket: str, environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some servers do not know an upload any more once it is complete."""
    completions = 0

    def forward(asked: Any) -> Answer:
        nonlocal completions
        answer, body = forwarded(asked, environment)
        if asked.command == "POST" and "uploadId" in asked.path:
            completions += 1
            if completions == 1:
                raise ConnectionAbortedError
            if completions == 2:
                return 404, b"<Error><Code>NoSuchUpload</Code></Error>", {}
        return answer.status, body, dict(answer.getheaders())

    (tmp_path / "file").write_bytes(content := bytes(17 << 20))
    with answering(forward) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link)
        at = Bucket(ObjectUrl(f"{bucket}/store"))
        at.upload("file", tmp_path / "file")
        assert at.size_and_crc("file") == size_and_crc(content)
    assert completions == 3


def test_the_same_content_from_another_writer_is_a_conflict(bucket: str) -> None:
    """Whoever announces first may write files that the other must not take for leftovers."""
    at = Bucket(ObjectUrl(f"{bucket}/store"))
    first = at.put_if_unchanged("ids.jsonl", b"", None)
    for version, content in ((None, b""), (first, b"announced")):
        at.put("ids.jsonl", content)
        with pytest.raises(WriteConflict):
            at.put_if_unchanged("ids.jsonl", content, version)


def test_a_lease_with_lost_responses_is_held_and_renewed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    monkeypatch.setattr("egopatch.features.io.object_lease.RENEW_S", 0.01)
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    real, renewed = obstore.put, threading.Semaphore(0)

    def put_twice(at: Any, key: str, *args: Any, **options: Any) -> Any:
        real(at, key, *args, **options)
        if "leases/0" in key:
            renewed.release()
        return real(at, key, *args, **options)  # the client's second try

    monkeypatch.setattr(obstore, "put", put_twice)
    with store.lease(0):
        assert all(renewed.acquire(timeout=60) for _ in range(4))
    assert not any("leases/0" in key for key in objects(bucket))


def test_unlock_keeps_a_lease_taken_meanwhile(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "this_process", classmethod(lambda cls: GONE))
        dead = [store.lease(shard) for shard in (0, 1)]
        for lease in dead:
            lease.__enter__()
    read, taken = object_lease._read_lease, store.lease(0)

    def then_take(*args: Any) -> Any:
        found = read(*args)
        if args[-1].endswith("00000001.json"):  # the last one
            monkeypatch.setattr(object_lease, "_read_lease", read)
            taken.__enter__()
        return found

    monkeypatch.setattr(object_lease, "_read_lease", then_take)
    storage = storage_at(store.path)
    assert storage.unlock() == [f"00000001.json: {GONE}"]
    with pytest.raises(ShardOwned, match="held by process"), open_store(store.path).lease(0):
        pass
    taken.__exit__(None, None, None)
    assert storage.unlock() == []
    storage.require_no_writers()
    for lease in dead:
        lease.__exit__(None, None, None)


def test_concurrent_growth_adds_every_row_once(bucket: str) -> None:
    url, lists = f"{bucket}/store", [tuple(f"clip {n}" for n in range(k, 12 + k)) for k in range(6)]
    threads = [threading.Thread(target=create_store, args=(url, SPEC, FINGERPRINT, ids)) for ids in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    planned = open_store(url).planned_ids
    assert sorted(planned) == sorted({name for ids in lists for name in ids})


def test_an_upload_removed_by_another_writer_is_repeated(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    second, real, uploads = open_store(first.path), Bucket.upload, []

    def upload(self: Bucket, key: str, path: Path) -> None:
        real(self, key, path)
        uploads.append(key)
        if len(uploads) == len(SPEC.arrays):
            second._writer.clear_leftovers(0)

    monkeypatch.setattr(Bucket, "upload", upload)
    first.write_shard(0, {name: clip(7) for name in IDS[:2]}, dict.fromkeys(IDS, "first"))
    assert open_store(first.path).clip_ids == IDS[:2]
    assert verify(first.path).ok
    assert storage_at(first.path).write_ids(0) == {first.catalog.ledger.write_id(0)}
