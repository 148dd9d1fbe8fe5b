"""Random sequences of writes, kills, damage, repairs, growth, conversions and reads, checked against a dict."""

import random
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from egopatch.features import AbsentClip, Failure, Fingerprint, FingerprintMismatch, Store, create_store, open_store
from egopatch.features.state.counts import StoreCounts, count_clips, read_ledger
from egopatch.features.storage.journal import decode_line
from egopatch.features.tools.convert import convert
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import verify
from tests.features.conftest import FINGERPRINT, FORMATS, SPEC, clip
from tests.features.faults import FAULTS, apply, faulty_files, fork, killed_at

ALL = tuple(f"clip {n}" for n in range(14))


class StoreMachine(RuleBasedStateMachine):
    """`values` is the oracle: the seed of every clip that must be readable.

    `uncounted` ones may get lost unnoticed if the ledger is damaged: their writer was killed after the ledger's line
    and before the head that counts it, so it had not returned.
    """

    format = "zarr"

    @initialize(count=st.integers(1, 6))
    def create(self, count: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.root = self.folder / "store"
        self.planned = ALL[:count]
        self.values: dict[str, int] = {}
        self.failed: dict[str, int] = {}
        self.uncounted: set[str] = set()
        self.copies = 0
        create_store(self.root, SPEC, FINGERPRINT, self.planned, self.format)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def store(self) -> Store:
        return open_store(self.root)

    def forget_counted(self) -> None:
        """Empty `uncounted` if the ledger's head counts all lines."""
        decoded = decode_line((self.root / "ledger.jsonl.head").read_bytes())
        assert decoded is not None
        if decoded[1]["bytes"] == (self.root / "ledger.jsonl").stat().st_size:
            self.uncounted.clear()

    @rule(seed=st.integers(0, 99), data=st.data())
    def write(self, seed: int, data: st.DataObject) -> None:
        work = self.store().missing_shards(retry_quarantined=True)
        if not work:
            return
        todo = data.draw(st.sampled_from(work))
        ids = data.draw(st.lists(st.sampled_from(todo.ids), unique=True, min_size=1))
        good, bad = ids[:-1] or ids, ids[-1:] if len(ids) > 1 else []
        rows = {name: clip(seed) for name in good}
        self.store().write_shard(todo.shard, rows, dict.fromkeys(rows, "x"), {name: Failure("no") for name in bad})
        self.values |= dict.fromkeys(good, seed)
        self.failed = {n: k for n, k in self.failed.items() if n not in good}
        for name in bad:
            self.failed[name] = self.failed.get(name, 0) + 1

    @rule(count=st.integers(1, 14))
    def grow(self, count: int) -> None:
        create_store(self.root, SPEC, FINGERPRINT, ALL[:count], self.format)
        self.planned = ALL[: max(count, len(self.planned))]

    @rule(seed=st.integers(0, 99), point=st.integers(0, 40), data=st.data())
    def write_and_be_killed(self, seed: int, point: int, data: st.DataObject) -> None:
        work = self.store().missing_shards()
        if not work:
            return
        todo = data.draw(st.sampled_from(work))

        def doomed() -> None:
            store = self.store()
            killed_at(point)()
            store.write_shard(todo.shard, {n: clip(seed) for n in todo.ids}, dict.fromkeys(todo.ids, "x"))

        self.forget_counted()
        assert fork(doomed).wait() in (0, -signal.SIGKILL)
        came_through = set(self.store().clip_ids) - self.values.keys()
        assert came_through in (set(), set(todo.ids))
        self.values |= dict.fromkeys(came_through, seed)
        self.uncounted |= came_through

    @rule(seed=st.integers(0, 2**16), fault=st.sampled_from(sorted(FAULTS)))
    def damage_and_repair(self, seed: int, fault: str) -> None:
        chance = random.Random(seed)
        path = chance.choice(faulty_files(self.root))
        if path.suffix not in (".jsonl", ".head", ".json", ".h5") and not path.name.startswith("c."):
            return
        if path.parent.name == "leases":
            return
        self.forget_counted()
        apply(path, fault, chance)
        report = verify(self.root)
        done = repair(self.root)
        assert verify(self.root).ok
        store = self.store()
        lost = self.values.keys() - set(store.clip_ids)
        if noticed := lost - (self.uncounted if path.name == "ledger.jsonl" else set()):
            assert not report.ok
            assert noticed <= set(done.dropped)
        for name in lost:
            del self.values[name]
        self.failed = {name: record.attempts for name, record in store.quarantine.items()}
        create_store(self.root, SPEC, FINGERPRINT, self.planned, self.format)

    @rule()
    def convert_there_and_back(self) -> None:
        self.copies += 1
        there = self.folder / f"there{self.copies}"
        back = self.folder / f"back{self.copies}"
        convert(self.root, there, format=next(name for name in FORMATS if name != self.format), shard=3)
        convert(there, back, format=self.format, shard=SPEC.shard)
        assert open_store(back).clip_ids == self.store().clip_ids
        self.root = back
        self.failed = dict.fromkeys(self.failed, 1)

    @rule()
    def another_fingerprint_is_refused(self) -> None:
        with pytest.raises(FingerprintMismatch):
            create_store(self.root, SPEC, Fingerprint({"depth": 1}), (), self.format)

    @rule()
    def read_everything(self) -> None:
        store = self.store()
        assert set(store.clip_ids) == set(self.values)
        assert set(store.planned_ids) == set(self.planned)
        assert {name: record.attempts for name, record in store.quarantine.items()} == self.failed
        assert set(store.missing()) == set(self.planned) - self.values.keys() - self.failed.keys()
        counts = (len(self.planned), len(self.values), len(self.failed), len(store.missing()))
        assert count_clips(self.root, read_ledger(self.root)) == StoreCounts(*counts, store.nbytes, FINGERPRINT.digest)
        ids = sorted(self.values)
        if ids:
            tokens = store.read(ids)
            for place, name in enumerate(ids):
                assert torch.equal(tokens.patches[place], clip(self.values[name])["patches"].half())

    @precondition(lambda self: len(self.values) < len(self.planned))
    @rule()
    def absent_clips_are_absent(self) -> None:
        absent = next(name for name in self.planned if name not in self.values)
        with pytest.raises(AbsentClip, match=absent):
            self.store().read([absent])

    @rule()
    def verify_is_clean(self) -> None:
        report = verify(self.root)
        assert report.ok, report.faults
        assert report.clips == len(self.values)


@pytest.mark.usefixtures("in_memory")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("examples", "steps"), [(6, 12), pytest.param(40, 25, marks=pytest.mark.slow)])
def test_store_matches_a_dict_under_random_operations(format: str, examples: int, steps: int) -> None:
    machine = type("Machine", (StoreMachine,), {"format": format})
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks, database=None
        ),
    )
