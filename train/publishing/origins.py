"""Finds out where the weights and the data behind a head come from, and under which terms."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from egopatch.configs.schema import ConfigError
from egopatch.extract.fetch.lockfile import Lockfile
from egopatch.extract.fetch.sources import DEFAULT_SOURCES, Source, load_sources
from egopatch.train.report.table import is_standin, is_synthetic
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.results import card_option


@dataclass(frozen=True)
class Origin:
    """Weights or data that a head was made from, with their licence.

    Attributes:
        what: Description of them.
        terms: Their licence; None if unknown.
    """

    what: str
    terms: str | None


def origins(card: Card) -> tuple[Origin, ...]:
    """All origins of a head, read from its card: the weights of both networks, and the data set.

    Raises:
        ConfigError: The checkpoint has the name of a published file, but not the SHA-256 in the lock file.
    """
    return (*_weights(card), _data(card))


def _weights(card: Card) -> Iterator[Origin]:
    video, text, plain = card.fingerprint, card.text_fingerprint, asdict(card)
    if video is None and text is None:
        return
    if is_standin(plain):
        yield Origin("encoder: a stand-in with RANDOM WEIGHTS, in the published network's file format", "none needed")
        return
    packages = [found.get("package") for found in (video, text) if found]
    for package in dict.fromkeys(str(package) for package in packages if package):
        yield Origin(f"weights of the package {package}", _licence(package.partition(" ")[0]))
    if checkpoint := card_option(plain, "encoder", "checkpoint"):
        yield _checkpoint("encoder", Path(str(checkpoint)), (video or text or {}).get("checkpoint"))
    elif video and "package" not in video:  # an encoder from outside, or features that were imported
        yield Origin(f"encoder: {card_option(plain, 'encoder', 'arch')}", None)
    if (started_from := card_option(plain, "head", "checkpoint")) not in (None, "", checkpoint):
        yield _checkpoint("head", Path(str(started_from)), None)
    if text and "text_checkpoint" in text and "package" not in text:
        yield Origin(f"text network: {Path(str(card_option(plain, 'text', 'model'))).name}", None)


def _licence(package: str) -> str | None:
    """The licence that an installed package states; None without one."""
    try:
        found = metadata.metadata(package).json
    except metadata.PackageNotFoundError:
        return None
    stated = found.get("license_expression") or found.get("license")
    return None if stated in (None, "", "UNKNOWN") else str(stated)


def _checkpoint(what: str, path: Path, used: object) -> Origin:
    """Origin of a checkpoint file; `used` is the SHA-256 of the file that was read, None if unknown."""
    sources = load_sources(DEFAULT_SOURCES)
    source = sources.checkpoint(path.name)
    if source is None:
        return Origin(f"{what}: {path.name}", None)
    locked = Lockfile(sources.lock_path).get(f"{source.name}/{path.name}")
    if locked is not None and used not in (None, locked.sha256):
        raise ConfigError(
            f"encoder.checkpoint is {path}, but the features were made with a file of SHA-256 {used}, and "
            f"{sources.lock_path} has {locked.sha256} for this name; give the checkpoint another name"
        )
    checked = "not compared with a lock file" if None in (locked, used) else f"SHA-256 as in {sources.lock_path}"
    return _published(f"{what}: {path.name}, {source.purpose} ({checked})", source)


def _data(card: Card) -> Origin:
    if is_synthetic(asdict(card)):
        return Origin("data: EgoSynth, rendered by this software", "MIT")
    name = str(card_option(asdict(card), "data", "name"))
    source = load_sources(DEFAULT_SOURCES).datasets.get(name)
    if source is None:
        return Origin(f"data: {name}", None)
    return _published(f"data: {name}, {source.purpose}", source)


def _published(what: str, source: Source) -> Origin:
    return Origin(what, f"{source.terms}; see {source.page}")
