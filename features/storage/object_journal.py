"""Journals in object storage: the same lines as in a file, in objects that are always written whole.

Appending writes the object again on condition that it is still the one that was read, so no line is ever torn, and of
two writers one is refused. Where every record is about a shard, each shard has its own object: writers of different
shards never conflict, and readers fetch only the objects that have changed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

from egopatch.features.io.bucket import Bucket, Content, Version
from egopatch.features.io.fields import Record, garbage_collection_paused
from egopatch.features.io.files import crc32c
from egopatch.features.storage.journal import Contents, Line, Position, encode_line, parse_lines
from egopatch.features.values.errors import DamagedStore, WriteConflict, write_conflict

Entry = TypeVar("Entry")
_TRIES = 20  # attempts to write, each after a conflict with another writer
_FETCHES, _AHEAD = 32, 256


@dataclass(frozen=True)
class ObjectOffset:
    """How far an object has been read: its version at that time, lines, bytes and their CRC-32C."""

    version: Version
    number: int
    end: int
    crc: int


@dataclass(frozen=True)
class ObjectPosition(Position):
    """How far each object has been read, by key."""

    offsets: Mapping[str, ObjectOffset]


class ObjectJournal(Generic[Entry]):
    """See `interface.Journal`.

    Args:
        bucket: The store's objects.
        name: Name such as `ids.jsonl`; with `by_shard`, `ledger.jsonl` becomes `ledger/00000003.jsonl` and so on.
        parse: As in `parse_lines`.
        by_shard: Whether every record is about one shard.
    """

    def __init__(self, bucket: Bucket, name: str, parse: Callable[[Record], Entry], by_shard: bool = False) -> None:
        self.name = name.removesuffix(".jsonl") if by_shard else name
        self._bucket = bucket
        self._parse = parse
        self._by_shard = by_shard

    def create(self) -> None:
        if not self._by_shard:
            with suppress(WriteConflict):
                self._bucket.put_if_unchanged(self.name, b"", None)

    def append(self, record: Record, after: Position | None = None) -> ObjectPosition:
        key = self._key(record.get("shard"))
        if not isinstance(after, ObjectPosition):
            return ObjectPosition({key: self._append_to_any(key, record)})
        offset = after.offsets.get(key)
        appended = self._append(key, record, None if offset is None else offset.version)
        return ObjectPosition({**after.offsets, key: appended})

    def rewrite(self, change: Callable[[list[Entry]], Sequence[Record]]) -> None:
        for key in self._keys():
            self._rewrite(key, change)

    def back_up_damaged(self) -> None:
        for key, found in self._fetch_all(self._keys()):
            if found is not None and self._lines(key, found.content, 0)[1]:
                self._bucket.put(f"{key}.damaged", found.content)

    def read(self, after: Position | None = None, shard: int | None = None) -> Contents[Entry]:
        from_start = not isinstance(after, ObjectPosition)
        seen = dict(after.offsets) if isinstance(after, ObjectPosition) else {}
        lines: list[Line[Entry]] = []
        faults: list[str] = []
        with garbage_collection_paused():
            for key, found in self._changed(seen, None if from_start else shard):
                if found is None:
                    faults.append(f"{key} is missing")
                    continue
                offset = seen.get(key)
                if offset is not None and crc32c(found.content[: offset.end]) != offset.crc:
                    return self.read()  # a repair has replaced the lines that were read before
                start, number = (offset.end, offset.number) if offset is not None else (0, 0)
                new_lines, new_faults, expected = self._lines(key, found.content[start:], number)
                lines += new_lines
                faults += new_faults
                seen[key] = ObjectOffset(found.version, expected, len(found.content), crc32c(found.content))
        return Contents(tuple(lines), from_start, tuple(faults), bool(faults), ObjectPosition(seen))

    def _append_to_any(self, key: str, record: Record) -> ObjectOffset:
        for _ in range(_TRIES):
            found = self._fetch(key)
            with suppress(WriteConflict):
                return self._append(key, record, None if found is None else found.version)
        raise write_conflict(key)

    def _rewrite(self, key: str, change: Callable[[list[Entry]], Sequence[Record]]) -> None:
        for _ in range(_TRIES):
            found = self._fetch(key)
            lines = [] if found is None else self._lines(key, found.content, 0)[0]
            records = change([line.entry for line in lines])
            content = b"".join(encode_line(number, record) for number, record in enumerate(records))
            with suppress(WriteConflict):
                if found is None or found.content != content:
                    self._bucket.put_if_unchanged(key, content, None if found is None else found.version)
                return
        raise write_conflict(key)

    def _append(self, key: str, record: Record, version: Version | None) -> ObjectOffset:
        """Append a line to the object if it still has `version`."""
        found = None if version is None else self._fetch(key)
        if version is not None and (found is None or found.version != version):
            raise write_conflict(key)
        content = b"" if found is None else found.content
        if content and not content.endswith(b"\n"):
            raise DamagedStore(f"{key} ends within a line; run `egopatch features repair` on the store")
        number = content.count(b"\n")
        content += encode_line(number, record)
        return ObjectOffset(
            self._bucket.put_if_unchanged(key, content, version), number + 1, len(content), crc32c(content)
        )

    def _lines(self, key: str, content: bytes, first: int) -> tuple[list[Line[Entry]], list[str], int]:
        raw = content.split(b"\n")
        torn = raw.pop()
        lines, faults, expected = parse_lines(raw, first, key, self._parse)
        return lines, faults + ([f"{key} ends within a line"] if torn else []), expected

    def _changed(self, seen: Mapping[str, ObjectOffset], shard: int | None) -> Iterable[tuple[str, Content | None]]:
        """Objects that have changed since they were `seen`; None for those that have vanished."""
        if self._by_shard and shard is None:
            present = self._listing()
            # Some providers list fewer fields than they return with the object itself, but always the ETag.
            changed = [key for key, now in present.items() if key not in seen or seen[key].version.e_tag != now.e_tag]
            return chain(((key, None) for key in seen if key not in present), self._fetch_all(changed))
        key = self._key(shard)
        try:
            found = self._bucket.get(key, unless=seen[key].version if key in seen else None)
            return [] if found is None else [(key, found)]
        except FileNotFoundError:
            return [(key, None)] if key in seen or not self._by_shard else []

    def _key(self, shard: int | None) -> str:
        return f"{self.name}/{shard:08d}.jsonl" if self._by_shard else self.name

    def _keys(self) -> list[str]:
        return list(self._listing()) if self._by_shard else [self.name]

    def _listing(self) -> dict[str, Version]:
        found = self._bucket.listing(self.name)
        return {key: version for key, version in sorted(found.items()) if key.endswith(".jsonl")}

    def _fetch(self, key: str) -> Content | None:
        try:
            return self._bucket.get(key)
        except FileNotFoundError:
            return None

    def _fetch_all(self, keys: Sequence[str]) -> Iterator[tuple[str, Content | None]]:
        with ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch") as pool:
            for start in range(0, len(keys), _AHEAD):  # bounds the number of objects in memory
                batch = keys[start : start + _AHEAD]
                yield from zip(batch, pool.map(self._fetch, batch), strict=True)
