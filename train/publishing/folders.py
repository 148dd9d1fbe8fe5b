"""Writes folders with everything that an upload needs. Nothing is sent anywhere."""

import dataclasses
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from egopatch.configs.schema import Config, ConfigError
from egopatch.features import Fingerprint, Store, open_store
from egopatch.features.tools.convert import convert
from egopatch.train.publishing.cards import head_card, store_card
from egopatch.train.publishing.origins import origins
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.names import CARD, CONFIG, TEST, WEIGHTS
from egopatch.train.rundir.results import read_run
from egopatch.train.rundir.run_folder import RunError, load_weights, write_whole

README = "README.md"
PUBLISHED = (WEIGHTS, CARD, CONFIG, TEST)


@dataclass(frozen=True)
class Publication:
    """The folders that were written.

    Attributes:
        folders: One folder for each upload.
        notes: Points to check before uploading.
    """

    folders: tuple[Path, ...]
    notes: tuple[str, ...]


def publish(config: Config, to: Path, terms: Sequence[str] = (), head_only: bool = False) -> Publication:
    """Write the run in `run.dir` to `to/head` and, unless `head_only`, its training features to `to/store`.

    Args:
        to: Folder to write. Files of an earlier call are replaced, and an interrupted copy of a store resumes.
        terms: Licences of weights and data without a known one: `NAME: LICENCE`, where NAME is part of a name that the
            error lists; any other text applies to all that no NAME fits.
        head_only: Whether to leave out the store.

    Raises:
        ConfigError: Weights or data have no known licence and `terms` states none, or have a published name
            but other contents.
        RunError: `run.dir` has no finished run, or one of its files is damaged.
        FingerprintMismatch: The store is not the one that the head was trained on.
        StoreError: A clip of the store is damaged.
    """
    run = config.run.dir
    card = Card.read(run)
    load_weights(run, card.best_epoch)  # refuses damaged weights, and those of another epoch
    if missing := [name for name in PUBLISHED if not (run / name).is_file()]:
        raise RunError(f"{run} has no {', '.join(missing)}; run: egopatch train evaluate --config CONFIG")
    try:
        scores = read_run(run).scores
    except ValueError as error:
        raise RunError(f"{run}: {error}") from None
    found = origins(card)
    stated = _stated([origin.what for origin in found if origin.terms is None], terms)
    if unknown := [what for what, licence in stated.items() if not licence]:
        raise ConfigError(
            f"no licence is known for {'; '.join(unknown)}; find out whether you may publish what was made from it, "
            "then state the terms of each with a --terms 'NAME: LICENCE' of its own; NAME is any part of a name listed "
            "above"
        )
    found = tuple(dataclasses.replace(origin, terms=origin.terms or stated[origin.what]) for origin in found)
    head = to / "head"
    head.mkdir(parents=True, exist_ok=True)
    for name in PUBLISHED:
        shutil.copyfile(run / name, head / name)
    write_whole(head / README, head_card(card, scores, found, [head / name for name in PUBLISHED]))
    folders, notes = [head], list(_notes(card))
    if not head_only and card.fingerprint is not None:
        open_store(config.store.path, expect=Fingerprint(card.fingerprint))
        store = convert(config.store.path, to / "store" / "features")
        write_whole(to / "store" / README, store_card(store, card, found))
        folders.append(to / "store")
        notes += _store_notes(store)
    return Publication(tuple(folders), tuple(notes))


def _stated(unknown: Sequence[str], terms: Sequence[str]) -> dict[str, str]:
    """The terms of each of `unknown`: those that name it, else those that name none of them; empty without any."""
    named: dict[str, list[str]] = {what: [] for what in unknown}
    others = []
    for text in terms:
        words = text.split(": ")  # names and licences may contain colons: the longest fitting name wins
        for cut in range(len(words) - 1, 0, -1):
            name, licence = ": ".join(words[:cut]), ": ".join(words[cut:])
            if fits := [what for what in unknown if name and name in what]:
                for what in fits:
                    named[what].append(licence.strip())
                break
        else:
            others.append(text.strip())
    return {what: "; ".join(filter(None, found or others)) for what, found in named.items()}


def _notes(card: Card) -> Iterator[str]:
    """Notes on what the files of a head reveal about this machine."""
    paths = {
        f"{section}.{name}": value
        for section, options in card.config.items()
        for name, value in options.items()
        if isinstance(value, str) and Path(value).is_absolute()
    }
    if paths:
        named = ", ".join(f"{name} {value}" for name, value in paths.items())
        yield f"{CARD} and {CONFIG} name folders of this machine: {named}"
    # Absolute paths: a whole word, or the rest of one after an equals sign, a blank or a quote, as in
    # --store.path=/data/my store.
    found = (re.search(r"(?:^|[\s='\"])(/.+)", word) for word in _words(card.command))
    if in_command := [path[1] for path in found if path]:
        yield f"{README} and {CARD} quote the command, which names folders of this machine: {', '.join(in_command)}"


def _store_notes(store: Store) -> Iterator[str]:
    """Notes on what the files of a store reveal about this machine."""
    videos = (origin.file for origin in store.origins().values() if origin is not None)
    if video := next((name for name in videos if Path(name).is_absolute()), None):
        yield f"the store lists the paths of its videos on this machine, such as {video}"
    reasons = (f"{record.reason} {record.traceback}" for record in store.quarantine.values())
    if named := next(filter(None, (re.search(r"(?:^|[\s='\"])(/[^\s'\"]+)", reason) for reason in reasons)), None):
        yield f"the store lists the reasons for quarantine, which name files of this machine, such as {named[1]}"


def _words(command: str) -> list[str]:
    """The words of a command without their quotes; if a quote is not closed, split at blanks only."""
    try:
        return shlex.split(command)
    except ValueError:
        return command.split()
