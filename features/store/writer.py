"""Writing shards whose lease is held: checks, encoding, and the commit protocol with its retries."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from egopatch.features.formats.interface import Format
from egopatch.features.io.files import write_errors_explained
from egopatch.features.state.catalog import Catalog
from egopatch.features.state.commit import CommitTarget, Committer, RowNotFinite, RowSource, ShardCommit, commit_shard
from egopatch.features.state.ledger import Provenance, RowVersion, announce_record, drop_record, ledger_journal
from egopatch.features.state.origin import Origin
from egopatch.features.state.quarantine import Failure, add_failures, quarantine_journal
from egopatch.features.storage.journal import Position
from egopatch.features.store.reader import RowReader
from egopatch.features.values.encoding import check_names, encode_row, is_stored_as_is, not_finite, reconstruction_error
from egopatch.features.values.errors import StoreError, WriteConflict
from egopatch.features.values.spec import ArraySpec

_TRIES = 5  # attempts to commit, each after a conflict with another writer

Rows = Mapping[str, Mapping[str, Tensor]]  # id -> array -> tensor, without the batch


@dataclass(frozen=True)
class _NewRow:
    """A clip's tensors and provenance, and whether the caller of `Store.write_shard` has found them to be finite."""

    tensors: Mapping[str, Tensor]
    provenance: Provenance
    finite: bool


class ShardWriter:
    """Writes whole shards of one store. The caller of each method holds the shard's lease, and has refreshed since.

    Threads may write different shards at the same time, and each may refresh the catalog that they share. So data that
    decides what is written is read after the ledger position that the commit is checked against, or under its lock.
    """

    def __init__(self, catalog: Catalog, reader: RowReader, file_format: Format) -> None:
        self._catalog = catalog
        self._reader = reader
        self._file_format = file_format

    def write(
        self,
        shard: int,
        rows: Rows,
        sources: Mapping[str, str],
        failures: Mapping[str, Failure],
        origins: Mapping[str, Origin],
        replaces: Mapping[str, RowVersion],
        machines: Mapping[str, str],
        committer: Committer,
        finite: Collection[str],
    ) -> None:
        """Commit new clips; arguments and errors as in `Store.write_shard`."""
        catalog = self._catalog
        self._check_ids(shard, rows, sources, failures, replaces)
        for name, tensors in rows.items():
            check_names(name, tensors, catalog.spec)
        with write_errors_explained(f"writing shard {shard} of {catalog.root}"):
            # The quarantine comes first: at every moment a reader must find a clip there or committed.
            add_failures(quarantine_journal(catalog.storage), shard, failures)
            if failed := [name for name in catalog.unchanged(replaces) if name in failures]:
                self.rewrite(shard, failed)
            if rows:
                new = {
                    name: _NewRow(
                        row, Provenance(sources[name], origins.get(name), machines.get(name, "")), name in finite
                    )
                    for name, row in rows.items()
                }
                self._commit_new(shard, new, replaces, committer)
        catalog.refresh(shard)

    def rewrite(self, shard: int, without: Sequence[str]) -> None:
        """Write a shard's files again; arguments as in `Store.rewrite_shard`."""
        catalog = self._catalog
        with write_errors_explained(f"rewriting shard {shard} of {catalog.root}"):
            with catalog.lock:
                after = catalog.position
                kept = [name for name in catalog.committed_of(shard) if name not in without]
                former = catalog.ledger.write_id(shard)
            if without:
                ledger_journal(catalog.storage).append(drop_record(shard, without, emptied=not kept), after)
                catalog.refresh(shard)
            if kept:
                self._commit(shard, {}, catalog.position)
            else:
                self._discard(shard, former)
            catalog.refresh(shard)

    def clear_leftovers(self, shard: int) -> None:
        """Remove the files that killed writers of the shard left."""
        catalog = self._catalog
        after = catalog.position
        leftovers = catalog.storage.write_ids(shard) - {catalog.ledger.write_id(shard)}
        if not leftovers:
            return
        try:
            with catalog.storage.committing(shard):
                # One of the writers may still be running. After this line it can no longer commit the files it has
                # written.
                ledger_journal(catalog.storage).append(announce_record(shard, {}), after)
                for write_id in leftovers:
                    self._discard(shard, write_id)
        except WriteConflict:
            pass  # one of the writers is running and was faster: its files are committed now
        catalog.refresh(shard)

    def _check_ids(
        self,
        shard: int,
        rows: Rows,
        sources: Mapping[str, str],
        failures: Mapping[str, Failure],
        replaces: Mapping[str, RowVersion],
    ) -> None:
        catalog = self._catalog
        for name in [*rows, *failures]:
            row = catalog.rows.get(name)
            if row is None or catalog.shard_of(row) != shard:
                where = "has no row" if row is None else f"belongs to shard {catalog.shard_of(row)}"
                raise StoreError(f"clip {name!r} {where} in {catalog.root}; expected an id of shard {shard}")
        for name in rows:
            if name in failures:
                raise StoreError(f"clip {name!r} is in both rows and failures; expected it in one of the two")
            if name not in sources:
                raise StoreError(f"clip {name!r} has no entry in sources; expected the hash of its video")
            if name in catalog.ledger.clips and name not in replaces:
                raise StoreError(
                    f"clip {name!r} is already committed in {catalog.root}; expected a clip in missing() or in replaces"
                )

    def _commit_new(
        self, shard: int, new: Mapping[str, _NewRow], replaces: Mapping[str, RowVersion], committer: Committer
    ) -> None:
        """Commit `new` rows, except those that another writer has committed in the meantime."""
        catalog = self._catalog
        self.clear_leftovers(shard)
        for conflicts in range(_TRIES):
            with catalog.lock:
                after = catalog.position
                to_replace = catalog.unchanged(replaces)
                new = {name: row for name, row in new.items() if name not in catalog.ledger.clips or name in to_replace}
            try:
                if new:
                    self._commit(shard, new, after, committer)
                break
            except WriteConflict:
                if conflicts == _TRIES - 1:
                    raise
                catalog.refresh(shard)
        if conflicts:
            catalog.refresh(shard)
            self.clear_leftovers(shard)  # the files of this process's refused commits

    def _commit(
        self, shard: int, new: Mapping[str, _NewRow], after: Position | None, committer: Committer = commit_shard
    ) -> None:
        """Commit the `new` rows with the shard's other rows unchanged, unless it has a commit later than `after`."""
        catalog = self._catalog
        with catalog.lock:
            former = catalog.committed_of(shard)
            kept = [name for name in former if name not in new]
            rows = {name: catalog.rows[name] for name in sorted([*kept, *new], key=catalog.rows.__getitem__)}
            provenance = {name: row.provenance for name, row in new.items()} | catalog.ledger.provenance(kept)
            commit = catalog.ledger.commits.get(shard)
            errors = dict(commit.errors) if commit and kept else {}
            write_id = catalog.ledger.write_id(shard)
        for row in new.values():
            error = reconstruction_error(row.tensors, catalog.spec)
            if error is not None:
                errors["patches"] = max(error, errors.get("patches", 0.0))
        digest = catalog.header.fingerprint.digest
        target = CommitTarget(catalog.storage, catalog.spec, self._file_format, digest)
        sources = [(array, self._sources(array, rows, new)) for array in catalog.spec.arrays]
        replaced = [name for name in former if name in new]
        try:
            committer(target, ShardCommit(shard, rows, sources, provenance, errors, after, replaced))
        except RowNotFinite as error:
            name, array = error.args
            raise not_finite(name, new[name].tensors, catalog.spec.array(array)) from None
        if write_id:
            self._discard(shard, write_id)

    def _discard(self, shard: int, write_id: str) -> None:
        self._catalog.storage.discard(shard, write_id, self._file_format.file_names(self._catalog.spec, shard))

    def _sources(self, array: ArraySpec, rows: Mapping[str, int], new: Mapping[str, _NewRow]) -> list[RowSource]:
        """The source of each of one array's `rows`: new rows are encoded, the others are read from the store."""
        spec, read = self._catalog.spec, self._reader.read_row

        def source(name: str) -> RowSource:
            if name not in new:
                return RowSource(partial(read, name, array), known_finite=True)
            row = new[name]
            # A finite number may be too large for another dtype.
            known_finite = row.finite and is_stored_as_is(row.tensors, array)
            return RowSource(partial(encode_row, name, row.tensors, array, spec), known_finite)

        return [source(name) for name in rows]
