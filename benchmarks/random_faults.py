"""Random faults on a store, against a model: nothing committed is lost, and nothing lost goes unnoticed.

    python benchmarks/random_faults.py [--rounds 500] [--seed 0] [--out benchmarks/results/random_faults.json]

A round is a small store, Zarr and HDF5 in turn, and twelve random events: a write; a write that is killed, meets a full
disk or an unreadable one; a damaged file and its repair; a lease held while the clock jumps; two processes that both
believe they hold a shard, one of them killed or not. After each, a fresh process's view of the store must equal the
model, a dict from clip to what was written. The seed of a round that fails is printed; `--seed S --rounds 1` repeats it
(which of two live processes is faster is not under the seed's control). Exit code 1 where a round failed.
"""

import argparse
import collections
import errno
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from unittest import mock

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402
from egopatch.features import Fingerprint, ShardOwned, Store, StoreError, StoreSpec, create_store, open_store  # noqa: E402
from egopatch.features.storage.folder import LocalStorage  # noqa: E402
from egopatch.features.tools.repair import repair  # noqa: E402
from egopatch.features.tools.verify import verify  # noqa: E402
from tests.features.faults import FAULTS, apply, faulty_files, fork, killed_at  # noqa: E402

IDS = tuple(f"clip {n}" for n in range(10))
SPEC = StoreSpec.for_patches(frames=2, grid=(2, 3), width=8, dtype="float16", shard=4)
FINGERPRINT = Fingerprint({"checkpoint": "sha256:1", "depth": 6})
EVENTS_A_ROUND = 12
FILE_OPERATIONS = 60  # a commit takes fewer
CLOCK_STEPS_S = (-3600, -2, -1, 1, 2, 3600)
REFUSED = 3  # exit code of a child whose write was refused


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Tensors as an encoder would give them for one clip; float16 values, so that the store keeps them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return {array.name: torch.randn(array.shape, generator=generator).half().float() for array in SPEC.arrays}


class Round:
    """One store and its model: `values` maps every clip that must be readable to the seed of its tensors."""

    def __init__(self, folder: Path, format: str, seed: int) -> None:
        self.root = folder / "store"
        self.format = format
        self.chance = random.Random(seed)
        self.values: dict[str, int] = {}
        self.create()

    def create(self) -> None:
        """Create the store, or restore what a repair removed from its description."""
        create_store(self.root, SPEC, FINGERPRINT, IDS, self.format)

    def run(self) -> list[str]:
        """Run all events of the round; returns their names."""
        names = [self.chance.choice(sorted(EVENTS)) for _ in range(EVENTS_A_ROUND)]
        for place, name in enumerate(names):
            try:
                EVENTS[name](self)
                self.check()
            except BaseException as error:
                error.add_note(f"event {place + 1} of {names[: place + 1]}")
                raise
        return names

    def check(self) -> None:
        """Check that the store, opened afresh, equals the model."""
        store = open_store(self.root)
        assert set(store.clip_ids) == set(self.values), (sorted(store.clip_ids), self.values)
        assert not self.wrong(store), self.wrong(store)
        report = verify(self.root)
        assert report.ok, report.faults

    def wrong(self, store: Store) -> list[str]:
        """Committed clips whose tensors are not the model's."""
        return [name for name in self.values if self.seed_of(store, name, {self.values[name]}) is None]

    def seed_of(self, store: Store, name: str, candidates: set[int]) -> int | None:
        """The one of `candidates` that is the seed of the clip's tensors in the store; None if no one is."""
        read = store.read([name]).patches[0]
        return next((seed for seed in sorted(candidates) if torch.equal(read, tensors(seed)["patches"].half())), None)

    def new_rows(self) -> tuple[int, dict[str, int]]:
        """A shard with missing clips, and some of these clips with seeds."""
        if not open_store(self.root).missing_shards():
            self.make_room()
        work = self.chance.choice(open_store(self.root).missing_shards())
        return work.shard, self.some_of(work.ids)

    def some_of(self, ids: Sequence[str]) -> dict[str, int]:
        """At least one of `ids`, with seeds."""
        return {n: self.chance.randrange(10**6) for n in self.chance.sample(ids, self.chance.randint(1, len(ids)))}

    def make_room(self) -> None:
        """Take some clips out of a full store, as `repair` does."""
        shard = self.chance.randrange(3)
        store = open_store(self.root)
        ids = self.some_of(IDS[4 * shard : 4 * shard + 4])
        store.rewrite_shard(shard, without=tuple(ids))
        for name in ids:
            del self.values[name]

    def settle(self, rows: dict[str, int]) -> None:
        """After a write that may have failed, add `rows` to the model if all were stored; fail if only some were."""
        came = set(open_store(self.root).clip_ids) - self.values.keys()
        assert came in (set(), set(rows)), (came, rows)
        self.values |= {name: rows[name] for name in came}


def write_rows(root: Path, shard: int, rows: dict[str, int]) -> None:
    """Write one shard as a job does."""
    open_store(root).write_shard(shard, {n: tensors(s) for n, s in rows.items()}, dict.fromkeys(rows, "sha256:x"))


def write(round: Round) -> None:
    """An ordinary commit."""
    shard, rows = round.new_rows()
    write_rows(round.root, shard, rows)
    round.values |= rows


def killed_write(round: Round) -> None:
    """A commit that ends at, or within, a random file operation."""
    shard, rows = round.new_rows()
    point = round.chance.randrange(FILE_OPERATIONS)

    def doomed() -> None:
        killed_at(point)()
        write_rows(round.root, shard, rows)

    fork(doomed).wait()
    round.settle(rows)


@contextmanager
def failing(code: int, names: tuple[str, ...], after: int) -> Iterator[None]:
    """From the call number `after` on, the functions `names` of `os` fail with an errno."""
    calls = iter(range(after, -1, -1))

    def broken(real: Callable) -> Callable:
        def call(*args: object) -> object:
            if next(calls, 0) == 0:
                raise OSError(code, os.strerror(code))
            return real(*args)

        return call

    with mock.patch.multiple(os, **{name: broken(getattr(os, name)) for name in names}):
        yield


def full_disk(round: Round) -> None:
    """A commit in which every sync fails from some moment on."""
    shard, rows = round.new_rows()
    with suppress(StoreError), failing(errno.ENOSPC, ("fsync",), round.chance.randrange(12)):
        write_rows(round.root, shard, rows)
    round.settle(rows)


def read_error(round: Round) -> None:
    """A commit and a read while the disk gives read errors: each must raise an error or give the right values."""
    shard, rows = round.new_rows()
    work = (lambda: write_rows(round.root, shard, rows)), (lambda: round.wrong(open_store(round.root)))
    for act in work:
        try:
            with failing(errno.EIO, ("pread", "preadv"), round.chance.randrange(30)):
                assert not act()
        except (StoreError, OSError) as error:
            if str(round.root) not in str(error):
                raise AssertionError("the message names no file of the store") from error
    round.settle(rows)


def damage(round: Round) -> None:
    """One damaged file: reading gives an error or the right values, `verify` sees it, `repair` drops what was lost."""
    skipped = ("leases", "commits")
    files = [path for path in faulty_files(round.root) if path.parent.name not in skipped and path.suffix != ".lock"]
    fault = round.chance.choice(sorted(FAULTS))
    path = round.chance.choice(files)
    apply(path, fault, round.chance)
    unreadable = True
    with suppress(StoreError):
        store = open_store(round.root)
        unreadable = bool(round.values.keys() - set(store.clip_ids))
        for name in round.values.keys() & set(store.clip_ids):
            try:
                assert round.seed_of(store, name, {round.values[name]}) is not None, f"{name} reads wrongly"
            except StoreError:
                unreadable = True
    noticed = not verify(round.root).ok
    assert noticed or not unreadable, f"{fault} of {path} went unnoticed"
    done = repair(round.root)
    round.create()
    lost = round.values.keys() - set(open_store(round.root).clip_ids)
    assert not lost or noticed
    assert lost <= set(done.dropped), (lost, done)
    for name in lost:
        del round.values[name]


def clock_step(round: Round) -> None:
    """A living process keeps its shard whatever the clock says, and an ended one does not."""
    shard, rows = round.new_rows()
    held, holding = os.pipe()

    def hold() -> None:
        with open_store(round.root).lease(shard):
            os.write(holding, b".")
            time.sleep(60)

    owner = fork(hold)
    assert os.read(held, 1)
    step = round.chance.choice(CLOCK_STEPS_S)
    real, boot, created = time.time, psutil.boot_time, psutil.Process.create_time

    def created_later(process: psutil.Process) -> float:
        return created(process) + step

    with (
        mock.patch.object(time, "time", side_effect=lambda: real() + step),
        mock.patch.object(psutil, "boot_time", side_effect=lambda: boot() + step),
        mock.patch.object(psutil.Process, "create_time", created_later),
    ):
        try:
            write_rows(round.root, shard, rows)
        except ShardOwned:
            pass
        else:
            raise AssertionError(f"a clock step of {step} s made the shard of a living process free")
        owner.kill()
        write_rows(round.root, shard, rows)
    round.values |= rows
    os.close(held)
    os.close(holding)


def double_owner(round: Round) -> None:
    """Two processes at once on one shard, whose leases were judged dead by mistake; perhaps one is killed."""
    shard, first = round.new_rows()
    second = round.some_of(next(work.ids for work in open_store(round.root).missing_shards() if work.shard == shard))
    point = round.chance.randrange(2 * FILE_OPERATIONS)
    gate, opened = os.pipe()

    def writer(rows: dict[str, int], dies: bool) -> Callable[[], None]:
        def work() -> None:
            os.close(opened)
            with mock.patch.object(LocalStorage, "lease", return_value=nullcontext()):
                os.read(gate, 1)  # ends when the parent closes the pipe
                if dies:
                    killed_at(point)()
                try:
                    write_rows(round.root, shard, rows)
                except StoreError:
                    os._exit(REFUSED)

        return work

    children = [fork(writer(first, dies=False)), fork(writer(second, dies=round.chance.random() < 0.5))]
    os.close(opened)
    codes = [child.wait() for child in children]
    os.close(gate)
    assert codes[0] in (0, REFUSED), codes
    store = open_store(round.root)
    came = set(store.clip_ids) - round.values.keys()
    for rows, code in zip((first, second), codes, strict=True):
        if code == 0:
            assert set(rows) <= came, (rows, came)
    for name in came:
        seed = round.seed_of(store, name, {rows[name] for rows in (first, second) if name in rows})
        assert seed is not None, f"{name} has the tensors of neither writer"
        round.values[name] = seed


EVENTS: dict[str, Callable[[Round], None]] = {
    event.__name__: event for event in (write, killed_write, full_disk, read_error, damage, clock_step, double_owner)
}


def run_rounds(first_seed: int, rounds: int) -> tuple[dict[str, int], list[int]]:
    """Run rounds; returns how often each event occurred, and the seeds of the rounds that failed."""
    counts: collections.Counter[str] = collections.Counter()
    failed = []
    for seed in range(first_seed, first_seed + rounds):
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts.update(Round(Path(folder), ("zarr", "hdf5")[seed % 2], seed).run())
            except Exception:
                failed.append(seed)
                print(f"seed {seed} failed:\n{traceback.format_exc()}")
    return dict(sorted(counts.items())), failed


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first round")
    add_result_arguments(parser, None, "four rounds")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 4
    started = time.monotonic()
    events, failed = run_rounds(args.seed, args.rounds)
    result = {
        "seeds": [args.seed, args.seed + args.rounds - 1],
        "events": events,
        "failed_seeds": failed,
        "seconds": round(time.monotonic() - started, 1),
        "machine": stamp("zarr", "h5py"),
    }
    print(json.dumps(result, indent=1))
    write_result(args, result)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
