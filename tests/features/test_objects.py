"""A store in object storage: killed at any request, rewritten while it is read, damaged, copied."""

import errno
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.store import MemoryStore

from egopatch.features import AbsentClip, DamagedStore, Failure, Store, StoreError, create_store, open_store
from egopatch.features.formats.zarr_shards import ZarrFormat
from egopatch.features.io.bucket import Bucket
from egopatch.features.io.files import size_and_crc
from egopatch.features.io.process import Owner
from egopatch.features.storage.objects import ObjectStorage
from egopatch.features.storage.pick import storage_at
from egopatch.features.tools.convert import convert
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import verify
from egopatch.features.values.location import ObjectUrl
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip, fill, maker
from tests.features.objects import objects
from tests.features.test_crash import BAD, check_values, committed_files, job

GONE = replace(Owner.this_process(), pid=2**22 + 1)  # no process of this machine
REQUESTS = ("put", "get", "get_range", "head", "list", "list_with_delimiter", "delete")


class Killed(BaseException):
    """Stands for SIGKILL: no handler catches it, and the process makes no further request."""


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
    patch.setattr(Owner, "this_process", classmethod(lambda cls: GONE))


def committed(url: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Names, sizes and checksums of every shard's files as the ledger has them."""
    return {str(shard): dict(commit.files) for shard, commit in open_store(url).catalog.ledger.commits.items()}


def check_whole_or_absent_and_finish(url: str, undisturbed: dict) -> None:
    if storage_at(url).exists("store.json"):
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
    commits = open_store(url).catalog.ledger.commits
    assert storage_at(url).write_ids_by_shard() == {shard: {commit.write_id} for shard, commit in commits.items()}


def crash_at_every(points: Iterator[int], bucket: str) -> int:
    """Kill a reopened job at each of `points`; returns how many it took until one got through."""
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


@pytest.mark.slow
def test_a_job_killed_at_some_requests_resumes_without_loss(bucket: str) -> None:
    assert crash_at_every(iter(range(3, 1000, 40)), bucket) >= 3


@pytest.mark.slow
def test_a_job_killed_at_every_request_resumes_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses obstore's in-memory store, which behaves like S3, conditional writes included, but without latency."""
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    stores: dict[str, MemoryStore] = defaultdict(MemoryStore)
    monkeypatch.setattr(obstore.store, "from_url", lambda url, **_: stores[url])
    assert crash_at_every(iter(range(1000)), "s3://bucket") >= 100


CHILD = """
import sys
import time
from egopatch.features import Store
from tests.features.test_crash import job

write_shard = Store.write_shard

def write_and_wait(*args, **kwargs):
    write_shard(*args, **kwargs)
    print("the lease of a written shard is held", flush=True)
    time.sleep(600)

Store.write_shard = write_and_wait
job(sys.argv[1], "zarr")
"""


@pytest.mark.slow
def test_a_sigkilled_and_resumed_store_equals_a_local_one(bucket: str, tmp_path: Path) -> None:
    """A real child process and a real SIGKILL; the lease of a dead process on this machine expires at once."""
    url = f"{bucket}/store"
    with subprocess.Popen([sys.executable, "-c", CHILD, url], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "the lease of a written shard is held\n"
        child.send_signal(signal.SIGKILL)
    assert verify(url).ok
    job(url, "zarr")
    job(tmp_path / "local", "zarr")
    assert verify(url).ok
    local, remote = open_store(tmp_path / "local"), open_store(url)
    ids = local.clip_ids
    assert remote.catalog.clip_records(ids) == local.catalog.clip_records(
        ids
    )  # rows, sources and every row's checksums
    assert committed(remote.path) == committed(local.path)  # and every file's
    for name, tensor in local.read(local.clip_ids).tensors().items():
        assert torch.equal(remote.read(local.clip_ids).tensors()[name], tensor), name


# Reading


def test_readers_survive_a_rewritten_shard(bucket: str) -> None:
    """The files that open readers know of are gone by then; the readers find the new ones."""
    writer = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    written = fill(writer, skip=(IDS[1],))
    reader, opened = open_store(writer.path), open_store(writer.path)
    opened.read(IDS[2:3])
    fill(writer)
    for store in (reader, opened):
        assert torch.equal(store.read([IDS[2]]).patches[0], written[IDS[2]]["patches"].half())
    with pytest.raises(AbsentClip):
        open_store(writer.path).read(["nobody"])


def test_verify_finds_no_fault_while_a_shard_is_rewritten(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    fill(writer, skip=(IDS[1],))
    real = ObjectStorage.shard_files
    late = iter([lambda: fill(writer)])

    def wrapped(self: ObjectStorage, shard: int, attempt: str) -> Any:
        next(late, lambda: None)()  # after the ledger was read, before the files are
        return real(self, shard, attempt)

    monkeypatch.setattr(ObjectStorage, "shard_files", wrapped)
    report = verify(writer.path)
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


def test_request_counts_per_shard_and_clip_stay_as_documented(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scaling.md counts on these."""
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    arrays = len(SPEC.arrays)
    counts = counted(monkeypatch)
    store.write_shard(0, {name: clip(0) for name in IDS[:4]}, dict.fromkeys(IDS, "x"))
    assert counts == {"put": arrays + 2, "get": arrays + 6, "list_with_delimiter": 1, "delete": 1}
    counts.clear()
    reopened = open_store(store.path)
    assert counts == {"get": 3, "list": 1}  # header, ids, the one shard's record
    counts.clear()
    reopened.read(IDS[:1])
    reopened.read(IDS[1:4])
    assert counts == {"get": arrays}  # so small a shard comes with its index
    counts.clear()
    reopened.catalog.refresh()
    assert counts == {"get": 1, "list": 1}  # nothing has changed


def test_large_files_are_uploaded_in_parts(bucket: str, tmp_path: Path) -> None:
    """Memory use is bounded by a few parts, whatever the size of the shard."""
    content = os.urandom(20 << 20)
    (tmp_path / "file").write_bytes(content)
    at = Bucket(ObjectUrl(f"{bucket}/store"))
    at.upload("file", tmp_path / "file")
    assert at.size_and_crc("file") == size_and_crc(content)
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


@pytest.mark.parametrize(
    "to",
    [
        lambda b: None,
        lambda b: bytes([b[0] ^ 1]) + b[1:],
        *(pytest.param(to, marks=pytest.mark.slow) for to in (lambda b: b[:-1], lambda b: b"")),
    ],
)
@pytest.mark.parametrize("ending", ["/patches/c.1.0", pytest.param("/timestamps/c.1.0", marks=pytest.mark.slow)])
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
        pytest.param("ledger/00000001", "ledger", lambda b: b[:-3], marks=pytest.mark.slow),
        pytest.param("ids.jsonl", "ids.jsonl", lambda b: b.replace(b"P5", b"P6"), marks=pytest.mark.slow),
        ("ids.jsonl", "ids.jsonl", lambda b: b""),
        ("quarantine/00000000", "quarantine", lambda b: b[:-3]),
    ],
)
def test_damaged_journals_are_found_and_repaired(store: Store, ending: str, where: str, to: Callable) -> None:
    change(store, ending, to)
    report = verify(store.path)
    assert report.faults[0].where == where
    # What a damaged part of the ledger had committed, and every clip whose row is lost with its id.
    assert sorted(report.bad_clips) == list({"ledger": IDS[4:8], "ids.jsonl": IDS}.get(where, ()))
    if where != "quarantine":
        with pytest.raises(DamagedStore, match=r"; run `egopatch features repair s3://"):
            open_store(store.path)
    repair(store.path)
    assert verify(store.path).ok
    fill(create_store(store.path, SPEC, FINGERPRINT, IDS))
    assert open_store(store.path).clip_ids == IDS
    assert verify(store.path).ok


def test_repair_removes_leftovers_of_dead_writers(store: Store) -> None:
    storage = storage_at(store.path)
    held = storage.write_ids_by_shard()
    with pytest.MonkeyPatch.context() as patch:
        # Killed after the commit, before the files that it made superfluous were gone.
        patch.setattr(ObjectStorage, "discard", lambda self, shard, write_id, names: None)
        create_store(store.path, SPEC, FINGERPRINT, [*IDS, "late"])
        fill(open_store(store.path))
    assert len(storage.write_ids_by_shard()[2]) == 2
    assert verify(store.path).ok
    assert repair(store.path).rewritten == ()
    left = storage.write_ids_by_shard()
    assert {shard: len(write_ids) for shard, write_ids in left.items()} == {0: 1, 1: 1, 2: 1}
    assert (left[0], left[1]) == (held[0], held[1])
    assert open_store(store.path).clip_ids == (*IDS, "late")
    assert verify(store.path).ok


# Copies


@pytest.mark.slow
def test_a_copy_to_object_storage_and_back_keeps_every_file(bucket: str, tmp_path: Path) -> None:
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


def test_a_full_temporary_folder_is_named_with_its_free_space(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = maker(f"{bucket}/store", "zarr")()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ZarrFormat, "stage", full)
    with pytest.raises(StoreError) as caught:
        store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "sha256:0"})
    assert re.fullmatch(
        rf"{tmp_path}/shard-00000000-\S+: No space left on device; a shard is written there before it is uploaded, and "
        r"\S+ [kMGT]B are free: set TMPDIR to a folder with more room",
        str(caught.value),
    )
