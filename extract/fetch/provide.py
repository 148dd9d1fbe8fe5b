"""Getting what a config needs: published archives, checkpoints and tokenizers, each locked to its SHA-256."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pooch

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.encoders import weights_path
from egopatch.extract.fetch.archives import ArchiveError, unpack
from egopatch.extract.fetch.download import DownloadError, Progress, fetch, free_bytes, nearest, part_of, remote_size
from egopatch.extract.fetch.lock import Lock, Locked
from egopatch.extract.fetch.sources import Source, Sources
from egopatch.features.io.files import write_file

BY_HAND = "by hand"

State = Literal["there", "locked", "fetched", "missing", "failed"]
# Shows one download: label to a context that gives what `fetch` reports to.
Meter = Callable[[str, int | None], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Need:
    """A file that a config needs.

    Attributes:
        name: in the lock, `SOURCE/FILE`; the path itself for a file that is published nowhere.
        file: where it goes.
        source: who publishes it; None for the user's own.
        link: direct link, if there is one.
        held: folders that the archive unpacks to, any of which shows that it was; none for a file used as it is.
        folder: where it is unpacked.
    """

    name: str
    file: Path
    source: Source | None = None
    link: str | None = None
    held: tuple[Path, ...] = ()
    folder: Path | None = None

    @property
    def record(self) -> Path:
        """Beside the archive: what was unpacked from it."""
        return self.file.with_name(f"{self.file.name}.unpacked.json")

    def unpacked(self) -> bool:
        """Whether the archive's folders are there, whole."""
        there = any(folder.is_dir() and any(folder.iterdir()) for folder in self.held)
        return there and _read_record(self).get("complete") is not False


@dataclass(frozen=True)
class Outcome:
    """What became of a need.

    Attributes:
        state: `there` as it should be; `locked`, there and seen for the first time; `fetched`; `missing`, to be put
            there by hand; `failed`.
        message: one line: what was found, or what to do.
    """

    need: Need
    state: State
    message: str
    size: int | None = None
    sha256: str | None = None

    @property
    def good(self) -> bool:
        """Whether the config can be run as far as this file goes."""
        return self.state in ("there", "locked", "fetched")


def needs(config: Config, sources: Sources) -> tuple[Need, ...]:
    """What `config` needs, in the order in which it is fetched: small things first.

    Raises:
        ConfigError: a checkpoint or tokenizer is neither there nor published.
    """
    encoder = config.encoder
    checkpoints = {
        "encoder.checkpoint": weights_path(encoder.arch, encoder.checkpoint),
        "head.checkpoint": config.head.checkpoint,
    }
    named = (_checkpoint(option, file, sources) for option, file in checkpoints.items() if file is not None)
    return (*_tokenizer(config, sources), *named, *_dataset(config, sources))


def _tokenizer(config: Config, sources: Sources) -> Iterator[Need]:
    folder = Path(config.text.model)
    source = sources.tokenizers.get(folder.name)
    if source is not None and len(folder.parts) > 1:
        for file in source.files:
            yield Need(f"{source.name}/{file}", folder / file, source, source.link(file))
    elif folder.is_dir():
        yield Need(str(folder), folder)
    elif len(folder.parts) > 1:
        raise ConfigError(
            f"text.model is {config.text.model!r}, which is not there, and no tokenizer of that name is published in"
            f" {sources.path} ({', '.join(sources.tokenizers)}); put it there, or name one of these"
        )
    # Else a name on the hub, which transformers fetches and keeps by itself.


def _checkpoint(option: str, file: Path, sources: Sources) -> Need:
    source = sources.checkpoint(file.name)
    if source is not None:
        return Need(f"{source.name}/{file.name}", file, source, source.link(file.name))
    if file.is_file():
        return Need(str(file), file)
    known = ", ".join(name for source in sources.checkpoints.values() for name in source.files)
    raise ConfigError(
        f"{option} is {str(file)!r}, which is not there, and no file of that name is published in"
        f" {sources.path} ({known}); put it there, or name one of these"
    )


def _dataset(config: Config, sources: Sources) -> Iterator[Need]:
    root = config.data.root
    source = sources.datasets.get(config.data.name)
    if source is None:
        for name in (config.data.clips, config.data.questions):
            yield Need(str(root / name), root / name)
        return
    for file, folders in source.files.items():
        held = tuple(root / folder for folder in folders)
        yield Need(f"{source.name}/{file}", root / "archives" / file, source, source.link(file), held, root)


def provide(
    wanted: tuple[Need, ...], lock: Lock, *, offline: bool, meter: Meter, say: Callable[[str], None]
) -> list[Outcome]:
    """Check what is there against the lock and get the rest.

    Args:
        wanted: from `needs`.
        lock: enforced, and extended by what is seen for the first time.
        offline: touch no network: what is missing is for the user to put there.
        meter: shows a download.
        say: takes lines for people.

    Returns:
        One outcome a need. A need that fails does not stop the others.

    Raises:
        DownloadError: the disk is too small for what is to be fetched; nothing was fetched then.
    """
    todo = [need for need in wanted if not offline and need.link is not None and _is_absent(need)]
    sizes = {need.name: remote_size(need.link) for need in todo if need.link is not None}
    _announce(todo, sizes, say)
    outcomes = []
    for need in wanted:
        try:
            outcome = _one(need, lock, offline, sizes.get(need.name), meter, say)
        except (DownloadError, ArchiveError) as error:
            outcome = Outcome(need, "failed", str(error))
        outcomes.append(outcome)
    return outcomes


def as_json(outcomes: Sequence[Outcome], lock: Lock) -> dict[str, Any]:
    """The outcomes for machines: `{"lock", "files": [{"name", "file", "state", "message", "bytes", "sha256"}]}`."""
    files = [
        {
            "name": one.need.name,
            "file": str(one.need.file),
            "state": one.state,
            "message": one.message,
            "bytes": one.size,
            "sha256": one.sha256,
        }
        for one in outcomes
    ]
    return {"lock": str(lock.path), "files": files}


def describe(outcomes: Sequence[Outcome]) -> str:
    """The outcomes for people, a line each."""
    return "\n".join(
        f"{one.state:<8} {one.need.file}: {one.message.removeprefix(f'{one.need.file}: ')}" for one in outcomes
    )


def _is_absent(need: Need) -> bool:
    return not need.file.exists() and not need.unpacked()


def _announce(todo: list[Need], sizes: dict[str, int | None], say: Callable[[str], None]) -> None:
    """Say what will be fetched, and refuse where the disk cannot hold it."""
    wanted_on: dict[int, int] = {}
    for source in {need.source.name: need.source for need in todo if need.source is not None}.values():
        say(f"{source.name}: {source.purpose}; terms: {source.terms}; from {source.page}")
    for need in todo:
        size = sizes[need.name]
        begun = part_of(need.file).stat().st_size if part_of(need.file).exists() else 0
        say(
            f"  {need.file}: {'size unknown' if size is None else in_units(size)}, {in_units(begun)} of it here already"
        )
        # An archive is there twice until it is deleted; it unpacks to its own size at the least.
        _add(wanted_on, need.file, (size or 0) * (2 if need.held else 1) - begun)
    folders = {_disk(need.file): need.file.parent for need in todo}
    for disk, folder in folders.items():
        wanted, free = wanted_on[disk], free_bytes(folder)
        say(f"  {in_units(wanted)} to come at {folder}, unpacked archives counted; {in_units(free)} free there")
        if wanted > free:
            raise DownloadError(
                f"the disk of {folder} has {in_units(free)} free and this needs {in_units(wanted)}, unpacked"
                " archives counted; make room, or set data.root and encoder.checkpoint to another disk"
            )


def _disk(path: Path) -> int:
    return nearest(path).stat().st_dev


def _add(wanted_on: dict[int, int], path: Path, size: int) -> None:
    wanted_on[_disk(path)] = wanted_on.get(_disk(path), 0) + size


def in_units(size: int) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def _one(need: Need, lock: Lock, offline: bool, size: int | None, meter: Meter, say: Callable[[str], None]) -> Outcome:
    locked = lock.get(need.name)
    if need.source is None:
        found = need.file.exists()
        return Outcome(need, "there" if found else "missing", "your own, not published" if found else "your own file")
    if not need.file.exists() and need.unpacked():
        return _unpacked_without_archive(need, locked)
    if need.file.exists():
        outcome = _check(need, lock, None if offline else need.link)
    elif offline or need.link is None:
        return Outcome(need, "missing", _by_hand(need, locked))
    else:
        with meter(need.name, size) as progress:
            fetch(need.link, need.file, None if locked is None else locked.sha256, progress)
        outcome = _seen(need, lock, "fetched")
    if not outcome.good:
        return outcome
    if need.folder is not None and (_read_record(need).get("sha256") != outcome.sha256 or not need.unpacked()):
        _unpack(need, outcome.sha256, say)
    if locked is None:  # only now: an archive that cannot be unpacked is not what everybody should have
        assert outcome.sha256 is not None
        assert outcome.size is not None
        origin = need.link if outcome.state == "fetched" and need.link is not None else BY_HAND
        lock.record(need.name, Locked(outcome.sha256, outcome.size, origin))
    return outcome


def _check(need: Need, lock: Lock, link: str | None) -> Outcome:
    """A file that is there, against the lock, or where it is not locked yet, against the link's size."""
    locked = lock.get(need.name)
    if locked is None:
        size, announced = need.file.stat().st_size, None if link is None else remote_size(link)
        if announced is not None and announced != size:
            message = f"{need.file}: has {size} bytes and {link} has {announced}; delete it, and this fetches it again"
            return Outcome(need, "failed", message)
        return _seen(need, lock, "locked")
    sha256 = pooch.file_hash(str(need.file))
    if sha256 != locked.sha256:
        return Outcome(
            need,
            "failed",
            f"{need.file}: its SHA-256 is {sha256}, the lock {lock.path} says {locked.sha256}; it was changed since."
            " Delete it and run this again; if it is meant to be another file now, delete its entry from the lock",
        )
    return Outcome(need, "there", "as locked", locked.size, sha256)


def _seen(need: Need, lock: Lock, state: State) -> Outcome:
    """A file that is there and good, with its hash: pooch has checked it where it was locked."""
    entry = lock.get(need.name)
    sha256 = pooch.file_hash(str(need.file)) if entry is None else entry.sha256
    return Outcome(need, state, f"locked in {lock.path}", need.file.stat().st_size, sha256)


def _unpacked_without_archive(need: Need, locked: Locked | None) -> Outcome:
    sha256 = _read_record(need).get("sha256")
    if sha256 is None:
        return Outcome(need, "there", f"its folders are in {need.folder}, put there by hand; doctor checks them")
    if locked is not None and sha256 != locked.sha256:
        message = f"{need.folder}: was unpacked from another {need.file.name} ({sha256}) than is locked"
        return Outcome(need, "failed", f"{message} ({locked.sha256}); delete its folders and run this again")
    return Outcome(need, "there", f"unpacked in {need.folder}; the archive is gone", sha256=sha256)


def _by_hand(need: Need, locked: Locked | None) -> str:
    assert need.source is not None
    how = need.source.by_hand or f"get {need.link}"
    expected = "" if locked is None else f"; it must hash to {locked.sha256}"
    return f"{how}; put it at {need.file}{expected}; then run this again"


def _unpack(need: Need, sha256: str | None, say: Callable[[str], None]) -> None:
    assert need.folder is not None
    say(f"unpacking {need.file}")
    _write_record(need, {"sha256": sha256, "complete": False})
    try:
        files, size = unpack(need.file, need.folder)
    except ArchiveError:
        need.record.unlink()
        raise
    if not any(folder.is_dir() for folder in need.held):
        need.record.unlink()
        expected = " or ".join(map(str, need.held))
        raise ArchiveError(f"{need.file}: unpacked {files} files into {need.folder}, but no {expected}; see its page")
    _write_record(need, {"sha256": sha256, "complete": True, "files": files, "bytes": size})
    say(f"unpacked {files} files, {in_units(size)}; {need.file} may be deleted now")


def _write_record(need: Need, record: dict[str, Any]) -> None:
    write_file(need.record, json.dumps(record).encode())


def _read_record(need: Need) -> dict[str, Any]:
    try:
        record = json.loads(need.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
