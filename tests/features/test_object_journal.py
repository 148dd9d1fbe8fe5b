"""Journals in object storage hold the lines of a file; only a writer that has read all of them can append."""

from pathlib import Path
from typing import Any

import pytest

from egopatch.features.io.bucket import Bucket
from egopatch.features.storage.journal import FileJournal
from egopatch.features.storage.object_journal import ObjectJournal
from egopatch.features.values.errors import WriteConflict
from egopatch.features.values.location import ObjectUrl
from tests.features.faults import flip_bit
from tests.features.objects import objects


def test_an_append_after_an_unread_line_conflicts(bucket: str) -> None:
    at = Bucket(ObjectUrl(f"{bucket}/store"))
    journal: ObjectJournal[Any] = ObjectJournal(at, "ids.jsonl", lambda record: record)
    journal.create()
    before = journal.read()
    journal.append({"n": 1}, before.position)
    with pytest.raises(
        WriteConflict, match=r"another process has written .*ids.jsonl in the meantime; run the same command again"
    ):
        journal.append({"n": 2}, before.position)
    after = journal.read(before.position)
    assert [line.entry for line in after.lines] == [{"n": 1}]
    assert not after.from_start
    journal.append({"n": 3}, after.position)
    assert [line.entry["n"] for line in journal.read().lines] == [1, 3]
    assert journal.read(journal.read().position).lines == ()


def test_object_journal_bytes_equal_those_of_a_file_journal(bucket: str, tmp_path: Path) -> None:
    records = [{"kind": "drop", "shard": 3, "ids": ["ü"], "emptied": False}, {"shard": 3}]
    file: FileJournal[Any] = FileJournal(tmp_path / "ledger.jsonl", lambda record: record)
    journal: ObjectJournal[Any] = ObjectJournal(
        Bucket(ObjectUrl(f"{bucket}/store")), "ledger.jsonl", lambda record: record, by_shard=True
    )
    file.create()
    for record in records:
        file.append(record)
        journal.append(record)
    (content,) = objects(bucket).values()
    assert content == (tmp_path / "ledger.jsonl").read_bytes()


def test_any_flipped_bit_is_a_fault(bucket: str) -> None:
    at = Bucket(ObjectUrl(f"{bucket}/store"))
    journal: ObjectJournal[Any] = ObjectJournal(at, "ids.jsonl", lambda record: record)
    journal.append({"ids": ["a"]})
    (content,) = objects(bucket).values()
    for bit in range(0, 8 * len(content), 7):
        at.put("ids.jsonl", flip_bit(content, bit))
        assert journal.read().lines_lost, f"bit {bit}"
