"""The writing side: leases, checks at the door, and shards handed to the commit protocol."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from egopatch.features.formats.interface import Format
from egopatch.features.io.files import disk_full_is_clear
from egopatch.features.state.catalog import Catalog
from egopatch.features.state.commit import Target, commit_shard
from egopatch.features.state.ledger import announce, drop, ledger_journal
from egopatch.features.state.quarantine import Failure, add_failures, quarantine_journal
from egopatch.features.store.reader import Reader
from egopatch.features.values.encoding import check_names, encode, reconstruction_error
from egopatch.features.values.errors import Overtaken, StoreError
from egopatch.features.values.spec import ArraySpec

_TRIES = 5  # to commit, each time overtaken by another writer

Rows = Mapping[str, Mapping[str, Tensor]]  # id -> one tensor an array, without the batch


class Writer:
    """Writes whole shards of the store that a catalog describes; see `Store` for what each method promises."""

    def __init__(self, catalog: Catalog, reader: Reader, files: Format, fingerprint: str) -> None:
        self._catalog = catalog
        self._reader = reader
        self._files = files
        self._fingerprint = fingerprint
        self._held: set[int] = set()

    @contextmanager
    def lease(self, shard: int) -> Iterator[tuple[str, ...]]:
        """See `Store.lease`."""
        catalog = self._catalog
        with catalog.storage.lease(shard):
            self._held.add(shard)
            try:
                catalog.refresh(shard)
                yield tuple(name for name in catalog.ids_of(shard) if name not in catalog.ledger.clips)
            finally:
                self._held.discard(shard)

    def write_shard(self, shard: int, rows: Rows, sources: Mapping[str, str], failures: Mapping[str, Failure]) -> None:
        """See `Store.write_shard`."""
        if shard in self._held:
            self._write_owned(shard, rows, sources, failures)
        else:
            with self.lease(shard):
                self._write_owned(shard, rows, sources, failures)

    def rewrite_shard(self, shard: int, without: Sequence[str]) -> None:
        """See `Store.rewrite_shard`."""
        catalog = self._catalog
        with self.lease(shard), disk_full_is_clear(f"rewriting shard {shard} of {catalog.root}"):
            left = [name for name in catalog.committed_of(shard) if name not in without]
            attempt = catalog.ledger.attempts.get(shard, "")
            if without:
                ledger_journal(catalog.storage).append(drop(shard, without, emptied=not left), catalog.position)
                catalog.refresh(shard)
            if left:
                self._commit(shard, {}, {})
            else:
                catalog.storage.discard(shard, attempt, self._files.files(catalog.spec, shard))
            catalog.refresh(shard)

    def clear_leftovers(self) -> None:
        """See `Store.clear_leftovers`."""
        committed = self._catalog.ledger.attempts
        for shard, attempts in sorted(self._catalog.storage.all_attempts().items()):
            if attempts - {committed.get(shard, "")}:
                with self.lease(shard):
                    self._clear_leftovers(shard)

    def _write_owned(self, shard: int, rows: Rows, sources: Mapping[str, str], failures: Mapping[str, Failure]) -> None:
        catalog = self._catalog
        self._check_ids(shard, rows, sources, failures)
        for name, tensors in rows.items():
            check_names(name, tensors, catalog.spec)
        with disk_full_is_clear(f"writing shard {shard} of {catalog.root}"):
            if rows:
                self._commit_new(shard, rows, sources)
            add_failures(quarantine_journal(catalog.storage), shard, failures)
        catalog.refresh(shard)

    def _check_ids(self, shard: int, rows: Rows, sources: Mapping[str, str], failures: Mapping[str, Failure]) -> None:
        catalog = self._catalog
        for name in [*rows, *failures]:
            row = catalog.rows.get(name)
            if row is None or catalog.shard_of(row) != shard:
                where = "has no row" if row is None else f"belongs to shard {catalog.shard_of(row)}"
                raise StoreError(f"clip {name!r} {where} in {catalog.root}; expected an id of shard {shard}")
        for name in rows:
            if name in failures:
                raise StoreError(f"clip {name!r} is given as encoded and as failed; expected one of the two")
            if name not in sources:
                raise StoreError(f"clip {name!r} has no entry in sources; expected the hash of its video")
            if name in catalog.ledger.clips:
                raise StoreError(
                    f"clip {name!r} is committed already in {catalog.root}; write only what missing() names"
                )

    def _commit_new(self, shard: int, new: Rows, sources: Mapping[str, str]) -> None:
        """Commit `new` rows; those that another writer has committed meanwhile stay as that one wrote them."""
        catalog = self._catalog
        self._clear_leftovers(shard)
        for overtaken in range(_TRIES):
            new = {name: row for name, row in new.items() if name not in catalog.ledger.clips}
            try:
                if new:
                    self._commit(shard, new, sources)
                break
            except Overtaken:
                if overtaken == _TRIES - 1:
                    raise
                catalog.refresh(shard)
        if overtaken:
            catalog.refresh(shard)
            self._clear_leftovers(shard)  # what was written here in vain

    def _clear_leftovers(self, shard: int) -> None:
        """Remove what writers that died have left of the shard."""
        catalog = self._catalog
        found = catalog.storage.attempts(shard) - {catalog.ledger.attempts.get(shard, "")}
        if not found:
            return
        try:
            # One of them may only seem dead. With this line there, what it has written so far cannot be committed.
            ledger_journal(catalog.storage).append(announce(shard, {}), catalog.position)
            for attempt in found:
                catalog.storage.discard(shard, attempt, self._files.files(catalog.spec, shard))
        except Overtaken:
            pass  # one of them is alive and was faster: its files are committed now
        catalog.refresh(shard)

    def _commit(self, shard: int, new: Rows, sources: Mapping[str, str]) -> None:
        """Commit the shard's rows of before, as they are, and the `new` ones."""
        catalog = self._catalog
        kept = catalog.committed_of(shard)
        rows = {name: catalog.rows[name] for name in sorted([*kept, *new], key=catalog.rows.__getitem__)}
        sources = {
            name: sources[name] if name in new else catalog.ledger.clips[name].clip(name).source for name in rows
        }
        errors = dict(catalog.ledger.errors.get(shard, {}))
        for tensors in new.values():
            error = reconstruction_error(tensors, catalog.spec)
            if error is not None:
                errors["patches"] = max(error, errors.get("patches", 0.0))
        target = Target(catalog.storage, catalog.spec, self._files, self._fingerprint, catalog.row_bytes)
        blocks = ((array, self._encoded(array, rows, new)) for array in catalog.spec.arrays)
        superseded = catalog.ledger.attempts.get(shard, "")
        commit_shard(target, shard, rows, blocks, sources, errors, catalog.position)
        if superseded:
            catalog.storage.discard(shard, superseded, self._files.files(catalog.spec, shard))

    def _encoded(self, array: ArraySpec, rows: Mapping[str, int], new: Rows) -> Iterator[np.ndarray]:
        """One array's `rows` as they are written; new ones are checked, others read, one at a time."""
        for name in rows:
            yield (
                encode(name, new[name], array, self._catalog.spec)
                if name in new
                else self._reader.read_row(name, array)
            )
