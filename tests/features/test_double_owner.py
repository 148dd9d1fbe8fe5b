"""Two processes that both believe they hold one shard of a folder store: neither loses a row."""

import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from egopatch.features import Store, create_store, open_store
from egopatch.features.formats.registry import format_named
from egopatch.features.io.files import size_and_crc_of_file
from egopatch.features.state.ledger import ledger_journal, raw_ledger_journal
from egopatch.features.storage.folder import LocalStorage
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import verify
from egopatch.features.values.errors import WriteConflict
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip

# Moments of a commit, in order, as (object, method, whether the other writer comes before it). At the last three the
# writer holds the lock of the shard's commits.
FREE = (("staging", True), ("committing", True))
LOCKED = (("publish", True), ("publish", False), ("append", True))

WRITER = """
import sys
from contextlib import nullcontext
from egopatch.features import open_store
from egopatch.features.storage.folder import LocalStorage
from egopatch.features.storage.journal import FileJournal
from tests.features.conftest import clip

path, index, moment, before = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
LocalStorage.lease = lambda self, shard: nullcontext()  # the other process's lease was judged dead by mistake
owner = FileJournal if moment == "append" else LocalStorage
real, paused = getattr(owner, moment), []

def pause():
    if not paused:
        paused.append(True)
        print("paused", flush=True)
        sys.stdin.readline()

def stop(self, *args, **kwargs):
    # Of the two records of a commit, the one that counts.
    now = moment != "append" or (self.name == "ledger.jsonl" and args[0]["kind"] == "commit")
    if now and before:
        pause()
    result = real(self, *args, **kwargs)
    if now and not before:
        pause()
    return result

setattr(owner, moment, stop)
store = open_store(path)
name = store.planned_ids[index]
store.write_shard(0, {name: clip(index)}, {name: "hash"})
"""


@pytest.fixture
def store(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(LocalStorage, "lease", lambda self, shard: nullcontext())
    return create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS, format)


def check(path: Path | str, indices: tuple[int, ...]) -> None:
    report = verify(path)
    assert report.ok, report.faults
    found = open_store(path)
    assert found.clip_ids == tuple(IDS[i] for i in indices)
    expected = torch.stack([clip(i)["patches"] for i in indices]).to(torch.float16)
    assert torch.equal(found.read(found.clip_ids).patches, expected)


@pytest.mark.parametrize(
    ("moment", "before"), [LOCKED[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in (*FREE, *LOCKED[1:]))]
)
def test_two_live_writers_of_one_shard_lose_no_row(store: Store, moment: str, before: bool) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.path), "1", moment, str(before)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == "paused\n"
    mine = threading.Thread(target=store.write_shard, args=(0, {IDS[0]: clip(0)}, {IDS[0]: "hash"}))
    mine.start()
    if (moment, before) in FREE:  # otherwise this process waits until the other one has committed
        mine.join()
        assert open_store(store.path).clip_ids == (IDS[0],)
    _, errors = child.communicate("go\n")
    mine.join()
    assert child.returncode == 0, errors
    check(store.path, (0, 1))


@pytest.mark.slow
def test_a_killed_committer_does_not_keep_the_lock(store: Store) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.path), "1", "publish", "False"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "paused\n"
    child.kill()
    child.communicate()
    store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "hash"})
    check(store.path, (0,))
    assert not list((Path(store.path) / "commits").iterdir())


def test_an_append_conflicts_with_an_unread_record_of_the_same_shard(store: Store) -> None:
    journal = ledger_journal(store.catalog.storage)
    read = journal.read().position
    journal.append({"kind": "announce", "shard": 1, "files": {}}, read)
    position = journal.append(
        {"kind": "announce", "shard": 0, "files": {}}, read
    )  # another shard's line is no conflict
    with pytest.raises(WriteConflict, match="run the same command again"):
        journal.append({"kind": "announce", "shard": 0, "files": {}}, read)
    journal.append({"kind": "announce", "shard": 0, "files": {}}, position)
    raw_ledger_journal(store.catalog.storage).rewrite(lambda records: records)
    with pytest.raises(WriteConflict):  # a repair may have put anything in place of what was read
        journal.append({"kind": "announce", "shard": 2, "files": {}}, read)


def lose_row(store: Store) -> None:
    """What two unfenced writers leave: both commits in the ledger, but only one row in the files."""
    store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "hash"})
    other = create_store(Path(store.path).with_name("other"), SPEC, FINGERPRINT, IDS, store.format)
    other.write_shard(0, {IDS[1]: clip(1)}, {IDS[1]: "hash"})
    for name in format_named(store.format).file_names(SPEC, 0):
        (Path(other.path) / name).replace(Path(store.path) / name)
    lines = raw_ledger_journal(other.catalog.storage).read().lines
    raw_ledger_journal(store.catalog.storage).append(lines[-1].entry)


def test_a_lost_row_is_found_and_repaired_although_checksums_match(store: Store) -> None:
    lose_row(store)
    ledger = open_store(store.path).catalog.ledger
    assert set(ledger.clips) == {IDS[0], IDS[1]}
    assert {n: size_and_crc_of_file(Path(store.path) / n) for n in ledger.commits[0].files} == ledger.commits[0].files
    report = verify(store.path)
    assert report.bad_clips == (IDS[0],)
    assert "does not hold every committed row" in report.faults[0].what
    assert repair(store.path).dropped == (IDS[0],)
    check(store.path, (1,))
    again = open_store(store.path)
    again.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "hash"})
    check(store.path, (0, 1))
