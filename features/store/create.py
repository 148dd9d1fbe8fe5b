"""Creating a store, and adding rows to one that exists."""

from collections.abc import Iterable, Sequence

from egopatch.features.formats.interface import Format
from egopatch.features.formats.registry import format_named
from egopatch.features.io.files import write_errors_explained
from egopatch.features.state.catalog import Catalog
from egopatch.features.state.header import HEADER, StoreHeader, create_header, header_record, parse_header, read_header
from egopatch.features.state.ids import RowPlan, add_rows, ids_journal, ids_without_row
from egopatch.features.state.ledger import ledger_journal
from egopatch.features.state.quarantine import quarantine_journal
from egopatch.features.storage.interface import Storage, file_matches
from egopatch.features.storage.journal import Position, require_intact
from egopatch.features.storage.pick import storage_at
from egopatch.features.store.store import Store, open_store
from egopatch.features.values.errors import BadLocation, FingerprintMismatch, WriteConflict, require_ids, require_type
from egopatch.features.values.location import Location
from egopatch.features.values.spec import Fingerprint, StoreSpec


def create_store(
    path: Location | str,
    spec: StoreSpec,
    fingerprint: Fingerprint,
    ids: Iterable[str],
    format: str = "zarr",
    option: str = "store.path",
) -> Store:
    """Create a store with a row for each of `ids`, or open the store at `path` and add rows for new ids.

    Rows never move: row r always belongs to shard r // spec.shard.

    Args:
        path: Folder or URL of the store.
        spec: Its shape.
        fingerprint: The settings that decide its values.
        ids: Ids that have a row afterwards.
        format: Name of the file format.
        option: The option by which the user names another `path`, for errors.

    Raises:
        FingerprintMismatch: The existing store was created with different settings; the message names them.
        StoreError: An id is unsafe, or the existing store is damaged.
        TypeError: `spec` or `fingerprint` has another type, or `ids` is not a list.
    """
    require_type("spec", spec, StoreSpec, "a StoreSpec, such as StoreSpec.for_patches(...)")
    require_type("fingerprint", fingerprint, Fingerprint, "a Fingerprint: Fingerprint({NAME: VALUE})")
    require_ids(ids)
    ids = list(ids)
    storage = storage_at(path)
    root = storage.location
    file_format = format_named(format, spec.codec)
    if not storage.in_place and file_format.needs_folder:
        raise BadLocation(f"format is {format!r}, but the store's location is {root} and HDF5 needs a folder; use zarr")
    requested = StoreHeader(spec, fingerprint, format)
    header_record(requested)  # refuse bad values and ids before anything is written
    ids_without_row((), ids, spec.kind)
    with write_errors_explained(f"creating {root}"):
        if storage.exists(HEADER) and _missing_rows(storage, requested, ids, option) is None:
            return open_store(path)  # the disk may be read-only
        storage.prepare()
        while True:
            try:
                _create_and_add_rows(storage, file_format, requested, ids, option)
                return open_store(path)
            except WriteConflict:
                continue  # another process has added rows; the next round adds those that still have none


def _create_and_add_rows(
    storage: Storage, file_format: Format, requested: StoreHeader, ids: Sequence[str], option: str
) -> None:
    """Create the store where it does not exist, and add rows for those of `ids` that have none."""
    with storage.adding_rows():
        if not storage.exists(HEADER):
            for journal in (ids_journal(storage), ledger_journal(storage), quarantine_journal(storage)):
                journal.create()
            Catalog(storage, requested)  # refuses clips of other settings, if the store has lost its header
        create_header(storage, header_record(requested))
        missing = _missing_rows(storage, requested, ids, option)
        if missing is not None:
            new_ids, known, after = missing
            header, rows = read_header(storage), known + len(new_ids)
            metadata = file_format.metadata_files(header, requested.spec, rows) if storage.in_place else {}
            add_rows(storage, new_ids, metadata, after)


def _missing_rows(
    storage: Storage, requested: StoreHeader, ids: Sequence[str], option: str
) -> tuple[list[str], int, Position] | None:
    """What the existing store needs to be the `requested` one with `ids`; None if it is complete. Only reads.

    Returns:
        The `ids` that have no row, which may be none if a crash kept metadata from being written; the number of rows;
        and how far the journal of ids was read.
    """
    if different := parse_header(read_header(storage)).differences(requested):
        raise FingerprintMismatch(
            f"store {storage.location} was created with different settings ({'; '.join(different)}); use another "
            f"{option} or the original settings"
        )
    plan, contents = RowPlan(), ids_journal(storage).read()
    require_intact(contents, storage.location)
    plan.add_all(contents)
    new_ids = ids_without_row(plan.row_ids, ids, requested.spec.kind)
    if not new_ids and all(file_matches(storage, name, expected) for name, expected in plan.files.items()):
        return None
    return new_ids, len(plan.row_ids), contents.position
