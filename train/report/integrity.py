"""The report's account of itself: which stores the runs read, whether they still match, versions and commands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from egopatch.features import Fingerprint, open_store
from egopatch.train.rundir.results import Results, Run


@dataclass(frozen=True)
class StoreFacts:
    """A store as it is now, beside what the heads' cards say of it.

    Attributes:
        path: as the cards name it.
        problem: why it cannot be opened; empty where it can.
        format: `zarr` or `hdf5`.
        committed: clips.
        planned: clips.
        quarantined: reason by clip id.
        nbytes: on disk.
        digest: of the fingerprint.
        fields: of the fingerprint.
        differences: what a card's fingerprint has otherwise than the store's, one line each.
    """

    path: str
    problem: str = ""
    format: str = ""
    committed: int = 0
    planned: int = 0
    quarantined: Mapping[str, str] | None = None
    nbytes: int = 0
    digest: str = ""
    fields: Mapping[str, object] | None = None
    differences: tuple[str, ...] = ()


def store_facts(results: Results) -> list[StoreFacts]:
    """Facts of every store that the cards name, in the order of the table."""
    cards: dict[str, list[Run]] = {}
    for row in results.rows:
        for run in row.runs:
            path = ((run.card.get("config") or {}).get("store") or {}).get("path")
            if path and run.card.get("fingerprint"):
                cards.setdefault(str(path), []).append(run)
    return [_facts(path, runs) for path, runs in cards.items()]


def versions(results: Results) -> dict[str, list[str]]:
    """Version(s) of each package that the runs were made with; more than one where they differ."""
    found: dict[str, list[str]] = {}
    for row in results.rows:
        for run in row.runs:
            for name, version in sorted((run.card.get("versions") or {}).items()):
                seen = found.setdefault(str(name), [])
                if str(version) not in seen:
                    seen.append(str(version))
    return found


def grid_of(paths: Sequence[Path | str], size: int) -> tuple[int, int]:
    """Rows and columns of patches: the first store's that opens, else 16-pixel patches of a `size` input."""
    for path in paths:
        try:
            grid = open_store(path).spec.grid
        except (OSError, ValueError):
            continue
        if grid:
            return grid
    return size // 16, size // 16


def _facts(path: str, runs: Sequence[Run]) -> StoreFacts:
    try:
        store = open_store(Path(path))
    except (OSError, ValueError) as error:
        return StoreFacts(path, problem=" ".join(str(error).split()))
    here = store.fingerprint
    differences: dict[str, None] = {}
    for run in runs:
        fields = run.card["fingerprint"]
        theirs = Fingerprint(fields.get("fields", fields))
        lines = theirs.differences(here, "run used", "store has")
        differences |= dict.fromkeys(f"{run.system} {run.split}: {line}" for line in lines)
    return StoreFacts(
        path,
        format=store.format,
        committed=len(store.clip_ids),
        planned=len(store.planned_ids),
        quarantined={clip: record.reason for clip, record in store.quarantine.items()},
        nbytes=store.nbytes,
        digest=here.digest,
        fields=dict(here.fields),
        differences=tuple(differences),
    )
