"""SIGKILL at any moment: each clip is complete or absent, `verify` is clean, and resuming gives the undisturbed result.

A child process does a whole job (create, fill, quarantine, grow, fill up old shards) and is killed before, or in the
middle of, its k-th operation on the file system, for every k until it gets through.
"""

import errno
import os
import random
import resource
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from egopatch.features import Failure, ShardWork, Store, StoreError, create_store, open_store
from egopatch.features.io.file_lease import lease_path
from egopatch.features.tools.verify import verify
from tests.features.conftest import FINGERPRINT, FORMATS, IDS, SPEC, clip
from tests.features.faults import count_operations, fork, killed_at, limited, report_operations

BAD = IDS[2]


def job(root: Path, format: str, at_once: int = 1) -> None:
    """What the child does and a restarted job repeats: write whatever is missing, `at_once` shards at a time."""
    for ids in (IDS[:6], IDS):
        store = create_store(root, SPEC, FINGERPRINT, ids, format)
        works = store.missing_shards()
        if at_once == 1:
            for work in works:
                write(store, work)
        else:
            with ThreadPoolExecutor(at_once) as threads:
                list(threads.map(partial(write, store), works))


def write(store: Store, work: ShardWork) -> None:
    rows = {name: clip(IDS.index(name)) for name in work.ids if name != BAD}
    failures = {BAD: Failure("broken file", "Traceback")} if BAD in work.ids else {}
    store.write_shard(work.shard, rows, {name: f"sha256:{name}" for name in rows}, failures)


def committed_files(root: Path) -> dict[str, bytes]:
    """Every file that holds rows or describes them to other tools, by name; journals tell what was tried, too."""
    files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    histories = ("leases/", "commits/", "growth.lock", "ledger.jsonl", "ids.jsonl", "quarantine.jsonl")
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(histories)}


@cache
def undisturbed(format: str) -> dict[str, bytes]:
    """The files that an uninterrupted job leaves."""
    with tempfile.TemporaryDirectory() as folder:
        job(Path(folder) / "store", format)
        return committed_files(Path(folder) / "store")


def check_whole_or_absent_and_finish(root: Path, format: str) -> None:
    if (root / "store.json").exists():
        report = verify(root)
        assert report.ok, report.faults
        store = open_store(root)
        check_values(store.clip_ids, root)
    job(root, format)
    store = open_store(root)
    assert store.clip_ids == tuple(name for name in IDS if name != BAD)
    assert set(store.quarantine) == {BAD}
    check_values(store.clip_ids, root)
    assert verify(root).ok
    assert list((root / "staging").iterdir()) == []
    assert committed_files(root) == undisturbed(format)


def check_values(ids: tuple[str, ...], root: Path) -> None:
    tokens = open_store(root).read(ids)
    for name, tensor in tokens.tensors().items():
        expected = [clip(IDS.index(clip_id))[name] for clip_id in ids]
        assert torch.equal(tensor, torch.stack(expected).to(tensor.dtype) if expected else tensor), name


def crash_at_every(points: Iterator[int], root: Path, format: str) -> int:
    """Kill a fresh job at each of `points`; returns how many it took until one got through."""
    for done, point in enumerate(points):
        store = root / str(point)

        def doomed(store: Path = store, point: int = point) -> None:
            killed_at(point)()
            job(store, format)

        code = fork(doomed).wait()
        if code >= 0:
            assert code == 0
            return done
        check_whole_or_absent_and_finish(store, format)
    raise AssertionError("the job never got through")


@pytest.mark.parametrize(
    ("format", "step", "kills"),
    [
        *((name, 29, 4) for name in FORMATS),
        # Most operations concern journals and leases, which both formats share.
        pytest.param("zarr", 1, 120, marks=pytest.mark.slow),
        pytest.param("hdf5", 2, 60, marks=pytest.mark.slow),
    ],
)
def test_a_job_killed_at_a_file_operation_resumes_without_loss(
    in_memory: Path, format: str, step: int, kills: int
) -> None:
    assert crash_at_every(iter(range(0, 1000, step)), in_memory, format) >= kills


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_job_killed_at_random_moments_resumes_without_loss(in_memory: Path, format: str) -> None:
    operations = count_operations(lambda: job(in_memory / "whole", format))
    chance = random.Random(0)
    for n in range(30):
        root = in_memory / str(n)
        reached, report = os.pipe()

        def work(root: Path = root, report: int = report, at_once: int = 1 + n % 3) -> None:
            report_operations(report)
            job(root, format, at_once)
            os.close(report)  # threads may have needed fewer operations
            signal.pause()  # the kill comes in any case

        child = fork(work)
        os.close(report)
        for _ in range(chance.randrange(1, operations)):
            os.read(reached, 1)
        child.kill()  # while it goes on: in the middle of whatever it does now
        os.close(reached)
        check_whole_or_absent_and_finish(root, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("after", [0, 3, 9, 20])
def test_a_full_disk_gives_one_clear_error_and_loses_nothing(
    tmp_path: Path, format: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    store = create_store(root, SPEC, FINGERPRINT, IDS, format)
    left = iter(range(after, -1, -1))
    real = os.fsync

    def full(handle: int) -> None:
        if next(left, 0) == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    def write_all() -> None:
        for work in open_store(root).missing_shards():
            store.write_shard(work.shard, {n: clip(IDS.index(n)) for n in work.ids}, dict.fromkeys(IDS, "x"))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"no space left while .* shard \d of .*run the same command again"):
            write_all()
    assert verify(root).ok
    check_values(open_store(root).clip_ids, root)
    assert not lease_path(root, 0).exists()
    assert not list(root.rglob("*.tmp"))
    write_all()
    assert verify(root).ok
    check_values(IDS, root)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("limit", [0, 100, 600, 900])
def test_a_file_size_limit_is_reported_as_a_full_disk(tmp_path: Path, format: str, limit: int) -> None:
    root = tmp_path / "store"
    store = create_store(root, SPEC, FINGERPRINT, IDS, format)
    rows = {name: clip(IDS.index(name)) for name in IDS[:4]}

    message = "^no space left while (writing|taking the lease of) shard 0"
    with limited(resource.RLIMIT_FSIZE, limit), pytest.raises(StoreError, match=message):
        store.write_shard(0, rows, dict.fromkeys(rows, "x"))
    assert verify(root).ok
    assert open_store(root).clip_ids == ()
    store.write_shard(0, rows, dict.fromkeys(rows, "x"))
    check_values(IDS[:4], root)
