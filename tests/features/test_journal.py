"""Every damaged, missing or reordered line of a journal is detected; a torn last line is accepted."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from egopatch.features.io.fields import Record, get_list
from egopatch.features.storage.journal import Contents, FileJournal, FilePosition, require_intact
from egopatch.features.values.errors import DamagedStore, WriteConflict
from tests.features.faults import flip_bit

RECORDS = [{"ids": ["a", "b\n"]}, {"ids": ["ü"]}, {"ids": []}]


def _ids_of(record: Record) -> list[str]:
    return get_list(record, "ids", str)


def records(contents: Contents) -> list[Record]:
    return [{"ids": line.entry} for line in contents.lines]


@pytest.fixture
def journal(tmp_path: Path) -> FileJournal:
    journal = FileJournal(tmp_path / "ledger.jsonl", _ids_of)
    journal.create()
    for record in RECORDS:
        journal.append(record)
    return journal


def test_a_journal_reads_back_what_was_appended(journal: FileJournal) -> None:
    contents = journal.read()
    assert records(contents) == RECORDS
    assert contents.faults == ()
    assert journal.path.read_text().count("\n") == 3


def test_a_torn_last_line_is_ignored_and_removed_by_the_next_append(journal: FileJournal) -> None:
    with journal.path.open("ab") as file:
        file.write(b'{"crc32c":"00')
    contents = journal.read()
    assert records(contents) == RECORDS
    assert contents.faults == ()
    journal.append({"ids": ["new"]})
    assert records(journal.read()) == [*RECORDS, {"ids": ["new"]}]
    assert journal.read().faults == ()


def test_a_line_newer_than_the_head_file_counts(journal: FileJournal) -> None:
    head = journal.head_path.read_bytes()
    journal.append({"ids": ["new"]})
    journal.head_path.write_bytes(head)  # as if killed between the two
    assert len(records(journal.read())) == 4
    written = journal.path.read_bytes()
    journal.path.write_bytes(written[:-5])  # like a line of which the crash let only a part through
    assert records(journal.read()) == RECORDS
    assert journal.read().faults == ()
    journal.path.write_bytes(written)
    journal.append({"ids": ["newer"]})
    assert len(records(journal.read())) == 5
    assert journal.read().faults == ()
    journal.path.write_bytes(written[:-5])  # now the head counts it
    assert journal.read().faults == ("ledger.jsonl ends after 3 of 5 lines",)


def test_reads_and_writes_that_the_system_cuts_short_are_continued(
    journal: FileJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux cuts them at 2 GiB."""
    pread, write, before = os.pread, os.write, journal.read().position
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: pread(handle, min(size, 40), offset))
    monkeypatch.setattr(os, "write", lambda handle, content: write(handle, content[:40]))
    journal.head_path.unlink()
    journal.append({"ids": ["new"]})
    contents = journal.read()
    assert records(contents) == [*RECORDS, {"ids": ["new"]}]
    assert contents.faults == ()
    journal.append({"shard": 1, "ids": ["x" * 80]})
    journal.append({"shard": 2, "ids": []})
    with pytest.raises(WriteConflict):
        journal.append({"shard": 2, "ids": []}, before)
    journal.append({"shard": 3, "ids": []}, before)


def test_a_torn_line_counted_by_the_head_is_a_fault_but_opens(journal: FileJournal) -> None:
    journal.path.write_bytes(journal.path.read_bytes()[:-5])
    contents = journal.read()
    assert contents.faults == ("ledger.jsonl ends after 2 of 3 lines",)
    require_intact(contents, journal.path.parent)


def _lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    return lambda content: b"".join(change(content.splitlines(keepends=True)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.replace(b'"a"', b'"c"'), "ledger.jsonl line 1 is damaged"),
        (_lines(lambda x: [x[0], x[1][:20] + x[1][21:], x[2]]), "ledger.jsonl line 2 is damaged"),
        (_lines(lambda x: [x[0], x[2]]), "ledger.jsonl line 2 has number 2; expected 1"),
        (
            _lines(lambda x: [x[1], x[0], x[2]]),
            "line 1 has number 1; expected 0",
        ),
        (_lines(lambda x: [x[0], x[1], x[1]]), "ledger.jsonl line 3 has number 1; expected 2"),
        (_lines(lambda x: x[:1]), "ledger.jsonl ends after 1 of 3 lines"),
        (lambda c: b"", "ledger.jsonl ends after 0 of 3 lines"),
    ],
)
def test_damage_is_reported_by_line_number(
    journal: FileJournal, damage: Callable[[bytes], bytes], message: str
) -> None:
    journal.path.with_name("store.json").touch()
    journal.path.write_bytes(damage(journal.path.read_bytes()))
    contents = journal.read()
    with pytest.raises(DamagedStore, match=message):
        require_intact(contents, journal.path.parent)


def test_any_flipped_bit_is_a_fault(journal: FileJournal) -> None:
    for path in (journal.path, journal.head_path):
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 3):
            path.write_bytes(flip_bit(content, bit))
            assert journal.read().faults, f"bit {bit} of {path.name}"
        path.write_bytes(content)
    journal.head_path.unlink()
    assert journal.read().faults


def test_a_replaced_journal_with_a_reused_inode_is_reread(journal: FileJournal) -> None:
    position = journal.read().position
    assert isinstance(position, FilePosition)
    journal.rewrite(lambda _: 2 * RECORDS)
    position = replace(position, inode=journal.path.stat().st_ino)  # the system uses free numbers again
    contents = journal.read(position)
    assert contents.from_start
    assert records(contents) == 2 * RECORDS
    with pytest.raises(WriteConflict):
        journal.append(RECORDS[0], position)
    journal.append(RECORDS[0], contents.position)
    assert not journal.read(contents.position).from_start
