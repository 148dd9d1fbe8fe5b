"""Provenance of the report: the stores that the runs read, whether they still match, and versions."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from egopatch.extract.datasets import Clip
from egopatch.extract.datasets.origins import OriginCheck, compare_origins
from egopatch.features import Fingerprint, Store, open_store
from egopatch.features.common.units import counted
from egopatch.train.rundir.results import Results, Run, card_option
from egopatch.train.rundir.trained_on import changed_clips


@dataclass(frozen=True)
class StoreFacts:
    """A store as it is now, compared with the model cards of the runs that read it.

    Attributes:
        path: Path in the cards.
        problem: Why the store cannot be opened; empty if it can.
        store: The open store; None if there is a problem.
        differences: One line for each field of a card's fingerprint that differs from the store's.
        check: The store's clips compared with the annotations; None if these cannot be read.
        outdated: One line for each run whose training clips were encoded again or removed since.
    """

    path: str
    problem: str = ""
    store: Store | None = None
    differences: tuple[str, ...] = ()
    check: OriginCheck | None = None
    outdated: tuple[str, ...] = ()


def store_facts(results: Results, clips: Collection[Clip], root: Path) -> list[StoreFacts]:
    """Facts of every store that the cards name, in the order of the table.

    Args:
        clips: Clips of the annotations; none if these cannot be read.
        root: `data.root`.
    """
    cards: dict[str, list[Run]] = {}
    for row in results.rows:
        for run in row.runs:
            path = card_option(run.card, "store", "path")
            if path and run.card.get("fingerprint"):
                cards.setdefault(str(path), []).append(run)
    return [_facts(path, runs, clips, root) for path, runs in cards.items()]


def versions(results: Results) -> dict[str, list[str]]:
    """Versions of each package according to the runs' cards; several if they differ."""
    found: dict[str, dict[str, None]] = {}
    for row in results.rows:
        for run in row.runs:
            for name, version in sorted((run.card.get("versions") or {}).items()):
                found.setdefault(str(name), {})[str(version)] = None
    return {name: list(listed) for name, listed in found.items()}


def grid_of(path: Path | str, size: int) -> tuple[int, int]:
    """Rows and columns of patches in a store; if it does not open, those of 16-pixel patches of a `size` input."""
    try:
        grid = open_store(path).spec.grid
    except (OSError, ValueError):
        grid = None
    return grid or (size // 16, size // 16)


def _facts(path: str, runs: Sequence[Run], clips: Collection[Clip], root: Path) -> StoreFacts:
    try:
        store = open_store(path)
        check = compare_origins(clips, root, store.origins()) if clips else None
        changed = {run.dir: len(changed_clips(run.dir, store)) for run in runs}
    except (OSError, ValueError) as error:
        return StoreFacts(path, problem=" ".join(str(error).split()))
    differences: dict[str, None] = {}
    for run in runs:
        lines = Fingerprint(run.card["fingerprint"]).differences(store.fingerprint, "run used", "store has")
        differences |= dict.fromkeys(f"{run.system} {run.split}: {line}" for line in lines)
    return StoreFacts(
        path,
        store=store,
        differences=tuple(differences),
        check=check,
        outdated=tuple(
            f"{folder}: {counted(count, 'clip was', 'clips were')} encoded again or removed after this run had been "
            "trained on them"
            for folder, count in changed.items()
            if count
        ),
    )
