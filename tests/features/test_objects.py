"""A store in object storage: killed at any request, taken over by others, damaged, copied; nothing is lost."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch

from features import AbsentClip, DamagedStore, Failure, ShardOwned, Store, create_store, open_store
from features.bucket import Bucket
from features.convert import convert
from features.durable import file_sum
from features.errors import Overtaken
from features.journal import FileJournal
from features.lease import Owner
from features.ledger import ledger_journal
from features.location import ObjectUrl, locate
from features.object_journal import ObjectJournal
from features.object_storage import ObjectStorage
from features.places import storage_at
from features.repair import repair
from features.verify import verify
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip, fill
from tests.features.objects import objects
from tests.features.test_crash import BAD, check_values, committed_files, job

GONE = Owner("", 2**22 + 1, 0.0)  # no process of this machine
REQUESTS = ("put", "get", "get_range", "head", "list", "list_with_delimiter", "delete")


class Killed(BaseException):
    """What stands for SIGKILL: it goes through every handler, and the storage hears nothing of the process after it."""


def killed_at(patch: pytest.MonkeyPatch, point: int) -> None:
    """Let the first `point` requests of this process through to the storage, and no other."""
    count = itertools.count()

    def deadly(request: Callable) -> Callable:
        def wrapped(*args: Any, **options: Any) -> Any:
            if next(count) >= point:
                raise Killed
            return request(*args, **options)

        return wrapped

    for name in REQUESTS:
        patch.setattr(obstore, name, deadly(getattr(obstore, name)))
    patch.setattr(Owner, "myself", classmethod(lambda cls: Owner(os.uname().nodename, GONE.pid, GONE.started)))


def committed(url: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Names, sizes and checksums of every shard's files as the ledger has them."""
    return {str(shard): dict(files) for shard, files in open_store(url)._catalog.ledger.files.items()}


def check_whole_or_absent_and_finish(url: str, undisturbed: dict) -> None:
    if storage_at(locate(url)).exists("store.json"):
        report = verify(url)
        assert report.ok, report.faults
        check_values(open_store(url).clip_ids, url)
    job(url, "zarr")
    assert open_store(url).clip_ids == tuple(name for name in IDS if name != BAD)
    assert set(open_store(url).quarantine) == {BAD}
    check_values(open_store(url).clip_ids, url)
    assert verify(url).ok
    assert committed(url) == undisturbed
    assert repair(url).before.ok  # removes what a kill between a commit and its tidying leaves, and nothing else
    assert verify(url).ok
    attempts = open_store(url)._catalog.ledger.attempts
    assert storage_at(locate(url)).all_attempts() == {shard: {attempt} for shard, attempt in attempts.items()}


def crash_at_every(points: Iterator[int], bucket: str) -> int:
    """Kill a fresh job at each of `points`; returns how many it took until one got through."""
    job(f"{bucket}/quiet", "zarr")
    undisturbed = committed(f"{bucket}/quiet")
    for done, point in enumerate(points):
        url = f"{bucket}/{point}"
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, point)
            try:
                job(url, "zarr")
                return done
            except Killed:
                pass
        check_whole_or_absent_and_finish(url, undisturbed)
    raise AssertionError("the job never got through")


def test_killed_at_some_requests(bucket: str) -> None:
    assert crash_at_every(iter(range(3, 1000, 19)), bucket) >= 5


@pytest.mark.slow
def test_killed_at_every_request(bucket: str) -> None:
    assert crash_at_every(iter(range(1000)), bucket) >= 100


CHILD = """
import sys
from tests.features.test_crash import job
print("ready", flush=True)
job(sys.argv[1], "zarr")
"""


def test_write_sigkill_resume_verify_and_equal_to_a_local_store(bucket: str, tmp_path: Path) -> None:
    """The real thing: another process, SIGKILL, and no waiting for the lease of a process of this machine."""
    url = f"{bucket}/store"
    child = subprocess.Popen([sys.executable, "-c", CHILD, url], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    while not any("/patches/" in key for key in objects(url)):
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert verify(url).ok
    job(url, "zarr")
    job(tmp_path / "local", "zarr")
    assert verify(url).ok
    local, remote = open_store(tmp_path / "local"), open_store(url)
    ids = local.clip_ids
    assert remote._catalog.records(ids) == local._catalog.records(ids)  # rows, sources and every row's checksums
    assert remote._catalog.ledger.files == local._catalog.ledger.files  # and every file's
    for name, tensor in local.read(local.clip_ids).tensors().items():
        assert torch.equal(remote.read(local.clip_ids).tensors()[name], tensor), name


# Two writers


def test_a_second_process_is_told_who_owns_what(bucket: str) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    other = open_store(store.path)
    with (
        store.lease(0),
        pytest.raises(ShardOwned, match=f"shard 0 of {bucket}.* is owned by process {os.getpid()} on "),
    ):
        other.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "x"})
    other.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "x"})
    assert not any("leases/0" in key for key in objects(bucket))


def test_a_silent_owner_on_another_machine_loses_its_lease(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    with monkeypatch.context() as patch:
        patch.setattr(Owner, "myself", classmethod(lambda cls: Owner("another-host", 7, 0.0)))
        held = store.lease(0)
        held.__enter__()
    with pytest.raises(ShardOwned, match="owned by process 7 on another-host"), store.lease(0):
        pass
    with pytest.raises(ShardOwned, match="process 7 on another-host is writing"):
        repair(store.path)
    monkeypatch.setattr("features.object_lease.LAPSE_S", 0.0)
    with store.lease(0):
        pass
    held.__exit__(None, None, None)


def test_a_lease_is_renewed_while_it_is_held(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.object_lease.RENEW_S", 0.1)
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
                    patch.setattr("features.object_lease.LAPSE_S", -1.0)
                    write()
                inside.now = False

        if before:
            other()
        done = real(self, *args)
        if not before:
            other()
        return done

    monkeypatch.setattr(ObjectStorage, moment, wrapped)


@pytest.mark.parametrize(("moment", "before"), [("publish", True), ("publish", False), ("attempts", False)])
def test_two_writers_of_one_shard_lose_nothing(
    bucket: str, monkeypatch: pytest.MonkeyPatch, moment: str, before: bool
) -> None:
    """The other comes in before anything is uploaded, between upload and commit, before leftovers are removed."""
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
    assert storage_at(store.path).attempts(0) == {store._catalog.ledger.attempts[0]}


def test_an_owner_that_only_seemed_dead_cannot_commit_what_was_cleared_away(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heir finds the upload of the first, which is still about to be committed, and removes it as a leftover."""
    first = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    second = open_store(first.path)
    others_write(
        monkeypatch,
        "publish",
        lambda: second.write_shard(0, {}, {}, {IDS[3]: Failure("no")}) or second._writer._clear_leftovers(0),
        before=False,
    )
    first.write_shard(0, {name: clip(7) for name in IDS[:2]}, dict.fromkeys(IDS, "first"))
    assert verify(first.path).ok
    assert open_store(first.path).clip_ids == IDS[:2]
    check = open_store(first.path).read(IDS[:2])
    assert torch.equal(check.patches[1], clip(7)["patches"].half())


def test_rows_of_another_stay_when_they_come_while_leftovers_are_cleared(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_writer_that_is_overtaken_again_and_again_says_so(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    storage = storage_at(store.path)
    note = {"kind": "announce", "shard": 0, "files": {}}
    others_write(monkeypatch, "publish", lambda: ledger_journal(storage).append(note), before=False, every=True)
    with pytest.raises(Overtaken, match=r"ledger/00000000.jsonl was written by somebody else meanwhile"):
        store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "x"})
    assert open_store(store.path).clip_ids == ()


def test_a_commit_whose_answer_was_lost_is_seen_as_made(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server wrote the record, its answer got lost, and the client's second try met what the first had done."""
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    real = Bucket.put_over

    def lossy(self: Bucket, key: str, content: bytes, version: Any) -> Any:
        done = real(self, key, content, version)
        if "ledger/" in key and b"commit" in content:
            raise Overtaken("refused")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put_over", lossy)
        store.write_shard(0, {name: clip(7) for name in IDS[:2]}, dict.fromkeys(IDS, "x"))
    assert store.clip_ids == IDS[:2]
    assert verify(store.path).ok


def test_many_add_rows_at_once(bucket: str) -> None:
    url, lists = f"{bucket}/store", [tuple(f"clip {n}" for n in range(k, 12 + k)) for k in range(6)]
    threads = [threading.Thread(target=create_store, args=(url, SPEC, FINGERPRINT, ids)) for ids in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    planned = open_store(url).planned_ids
    assert sorted(planned) == sorted({name for ids in lists for name in ids})


def _share_the_work(url: str, wrote: list[int]) -> None:
    store = open_store(url)
    while missing := store.missing_shards():
        for work in missing:
            with suppress(ShardOwned), store.lease(work.shard) as left:
                rows = {name: clip(int(name)) for name in left}
                store.write_shard(work.shard, rows, dict.fromkeys(rows, "x"))
                wrote.append(len(rows))
        store.refresh()


WORKER = (
    "import sys; from tests.features.test_objects import _share_the_work as w; n = []; w(sys.argv[1], n); print(sum(n))"
)


def test_two_processes_share_the_work_and_a_reader_looks_on(bucket: str) -> None:
    url, ids = f"{bucket}/store", tuple(str(n) for n in range(40))
    store = create_store(url, SPEC, FINGERPRINT, ids)
    children = [
        subprocess.Popen([sys.executable, "-c", WORKER, url], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    while len(store.clip_ids) < len(ids):
        assert any(child.poll() in (None, 0) for child in children)
        store.refresh()
        for name in store.clip_ids[-3:]:
            assert torch.equal(store.read([name]).patches[0], clip(int(name))["patches"].half())
    wrote = [int(child.communicate()[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sum(wrote) == len(ids)  # nothing lost, nothing done twice
    assert verify(url).ok


# Reading


def test_readers_go_on_when_a_shard_is_written_again(bucket: str) -> None:
    """The files that they know are gone then; `verify`, too, is told where the later ones are."""
    writer = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    written = fill(writer, skip=(IDS[1],))
    reader, opened = open_store(writer.path), open_store(writer.path)
    opened.read(IDS[2:3])
    fill(writer)
    for store in (reader, opened):
        assert torch.equal(store.read([IDS[2]]).patches[0], written[IDS[2]]["patches"].half())
    with pytest.raises(AbsentClip):
        open_store(writer.path).read(["nobody"])


def test_verify_while_a_shard_is_written_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    fill(writer, skip=(IDS[1],))
    real = ObjectStorage.shard_files
    late = iter([lambda: fill(writer)])

    def wrapped(self: ObjectStorage, shard: int, attempt: str) -> Any:
        next(late, lambda: None)()  # after the ledger was read, before the files are
        return real(self, shard, attempt)

    monkeypatch.setattr(ObjectStorage, "shard_files", wrapped)
    report = verify(writer.path, workers=1)
    assert report.ok, report.faults


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    counts: dict[str, int] = {}

    def counting(name: str, request: Callable) -> Callable:
        def wrapped(*args: Any, **options: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return request(*args, **options)

        return wrapped

    for name in REQUESTS:
        monkeypatch.setattr(obstore, name, counting(name, getattr(obstore, name)))
    return counts


def test_requests_for_a_shard_and_for_a_clip(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scaling.md counts on these."""
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    arrays = len(SPEC.arrays)
    counts = counted(monkeypatch)
    store.write_shard(0, {name: clip(0) for name in IDS[:4]}, dict.fromkeys(IDS, "x"))
    assert counts == {"put": arrays + 2, "get": arrays + 6, "list_with_delimiter": 1, "delete": 1}
    counts.clear()
    fresh = open_store(store.path)
    assert counts == {"get": 3, "list": 1}  # header, ids, the one shard's record
    counts.clear()
    fresh.read(IDS[:1])
    fresh.read(IDS[1:4])
    assert counts == {"get": arrays}  # so small a shard comes with its index
    counts.clear()
    fresh.refresh()
    assert counts == {"get": 1, "list": 1}  # nothing has changed


def test_large_files_go_up_in_parts(bucket: str, tmp_path: Path) -> None:
    """So that memory is that of a few parts, whatever a shard's size."""
    content = os.urandom(20 << 20)
    (tmp_path / "file").write_bytes(content)
    at = Bucket(ObjectUrl(f"{bucket}/store"))
    at.upload("file", tmp_path / "file")
    assert at.sum_of("file") == file_sum(content)
    version = at.listing("")["file"]
    assert version.e_tag.endswith('-2"')  # two parts of up to 16 MiB


# Damage


@pytest.fixture
def store(bucket: str) -> Store:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    store.write_shard(0, {}, {}, {IDS[0]: Failure("broken", "Traceback")})
    fill(store)
    store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "x"})
    return store


def change(store: Store, ending: str, to: Callable[[bytes], bytes | None]) -> None:
    """Change the one object whose key has `ending` in it."""
    (key,) = [key for key in objects(str(store.path)) if ending in key]
    bucket, name = Bucket(ObjectUrl("s3://" + store.path.bucket + "/some")), key.removeprefix("some/")  # type: ignore[union-attr]
    found = bucket.get(name)
    assert found is not None
    content = to(found.content)
    if content is None:
        bucket.delete([name])
    else:
        bucket.put(name, content)


@pytest.mark.parametrize("to", [lambda b: b[:-1], lambda b: b"", lambda b: None, lambda b: bytes([b[0] ^ 1]) + b[1:]])
@pytest.mark.parametrize("ending", ["/patches/c.1.0", "/timestamps/c.1.0"])
def test_damaged_objects_are_found_named_and_repaired(store: Store, ending: str, to: Callable) -> None:
    expected = store.read(IDS).tensors()
    change(store, ending, to)
    report = verify(store.path)
    assert {fault.where for fault in report.faults} == {ending.strip("/") + (".0.0" if "patches" in ending else "")}
    assert set(report.bad_clips) <= set(IDS[4:8])
    assert report.bad_clips
    with pytest.raises(DamagedStore, match=r"clip .*verify"):
        open_store(store.path).read(IDS)
    assert repair(store.path).dropped == report.bad_clips
    assert verify(store.path).ok
    fill(open_store(store.path))
    assert verify(store.path).ok
    for name, tensor in open_store(store.path).read(IDS).tensors().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("ending", "where", "to"),
    [
        ("ledger/00000001", "ledger", lambda b: b.replace(b"P5", b"P6")),
        ("ledger/00000001", "ledger", lambda b: b[:-3]),
        ("ids.jsonl", "ids.jsonl", lambda b: b.replace(b"P5", b"P6")),
        ("ids.jsonl", "ids.jsonl", lambda b: b""),
        ("quarantine/00000000", "quarantine", lambda b: b[:-3]),
    ],
)
def test_damaged_journals_are_found_and_repaired(store: Store, ending: str, where: str, to: Callable) -> None:
    change(store, ending, to)
    assert next(fault.where for fault in verify(store.path).faults) == where
    if where != "quarantine":
        with pytest.raises(DamagedStore, match=r"; run `python -m features repair s3://"):
            open_store(store.path)
    repair(store.path)
    assert verify(store.path).ok
    fill(create_store(store.path, SPEC, FINGERPRINT, IDS))
    assert open_store(store.path).clip_ids == IDS
    assert verify(store.path).ok


def test_repair_removes_what_dead_writers_left(store: Store) -> None:
    storage = storage_at(store.path)
    held = storage.all_attempts()
    with pytest.MonkeyPatch.context() as patch:
        # Killed after the commit, before the files that it made superfluous were gone.
        patch.setattr(ObjectStorage, "discard", lambda self, shard, attempt, names: None)
        create_store(store.path, SPEC, FINGERPRINT, [*IDS, "late"])
        fill(open_store(store.path))
    assert len(storage.all_attempts()[2]) == 2
    assert verify(store.path).ok
    assert repair(store.path).rewritten == ()
    left = storage.all_attempts()
    assert {shard: len(attempts) for shard, attempts in left.items()} == {0: 1, 1: 1, 2: 1}
    assert (left[0], left[1]) == (held[0], held[1])
    assert open_store(store.path).clip_ids == (*IDS, "late")
    assert verify(store.path).ok


# Journals


def test_a_line_follows_only_what_its_writer_has_read(bucket: str) -> None:
    at = Bucket(ObjectUrl(f"{bucket}/store"))
    journal: ObjectJournal[Any] = ObjectJournal(at, "", "ids.jsonl", lambda record: record)
    journal.create()
    before = journal.read()
    journal.append({"n": 1}, before.position)
    with pytest.raises(Overtaken, match=r"ids.jsonl was written by somebody else meanwhile"):
        journal.append({"n": 2}, before.position)
    after = journal.read(before.position)
    assert [line.entry for line in after.lines] == [{"n": 1}]
    assert not after.whole
    journal.append({"n": 3}, after.position)
    assert [line.entry["n"] for line in journal.read().lines] == [1, 3]
    assert journal.read(journal.read().position).lines == ()


def test_the_lines_are_those_of_a_file(bucket: str, tmp_path: Path) -> None:
    records = [{"kind": "drop", "shard": 3, "ids": ["ü"], "emptied": False}, {"shard": 3}]
    file: FileJournal[Any] = FileJournal(tmp_path / "ledger.jsonl", lambda record: record)
    journal: ObjectJournal[Any] = ObjectJournal(
        Bucket(ObjectUrl(f"{bucket}/store")), "", "ledger.jsonl", lambda record: record, by_shard=True
    )
    file.create()
    for record in records:
        file.append(record)
        journal.append(record)
    (content,) = objects(bucket).values()
    assert content == (tmp_path / "ledger.jsonl").read_bytes()


def test_any_flipped_bit_is_a_fault(bucket: str) -> None:
    at = Bucket(ObjectUrl(f"{bucket}/store"))
    journal: ObjectJournal[Any] = ObjectJournal(at, "", "ids.jsonl", lambda record: record)
    journal.append({"ids": ["a"]})
    (content,) = objects(bucket).values()
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        at.put("ids.jsonl", bytes(flipped))
        assert journal.read().lost, f"bit {bit}"


# Copies


def test_there_and_back_every_file_is_the_same(bucket: str, tmp_path: Path) -> None:
    local = create_store(tmp_path / "here", SPEC, FINGERPRINT, IDS)
    local.write_shard(0, {}, {}, {BAD: Failure("broken", "Traceback")})
    fill(local, skip=(BAD,))
    fill(create_store(tmp_path / "here" / "text", SPEC, FINGERPRINT, ("a", "b")))
    there = convert(local.path, f"{bucket}/there")
    assert str(there.path) == f"{bucket}/there"
    assert there.quarantine.keys() == {BAD}
    back = convert(there.path, tmp_path / "back")
    assert committed_files(back.path) == committed_files(local.path)
    assert verify(f"{bucket}/there").ok
    assert open_store(f"{bucket}/there/text").clip_ids == ("a", "b")
