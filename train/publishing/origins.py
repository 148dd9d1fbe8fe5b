"""Where the weights and the data behind a head come from, and under which terms."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.fetch.lockfile import Lockfile
from egopatch.extract.fetch.sources import DEFAULT_SOURCES, Source, load_sources
from egopatch.train.report.table import is_standin, is_synthetic
from egopatch.train.rundir.card import Card


@dataclass(frozen=True)
class Origin:
    """Weights or data that a head was made from, with their licence.

    Attributes:
        what: What they are.
        terms: Their licence; None if nothing here names one.
    """

    what: str
    terms: str | None


def origins(config: Config, card: Card) -> tuple[Origin, ...]:
    """Every origin of a head: the weights of both networks, and the data set.

    Raises:
        ConfigError: The checkpoint bears the name of a published file and has other bytes than the locked one.
    """
    return (*_weights(config, card), _data(config, card))


def _weights(config: Config, card: Card) -> Iterator[Origin]:
    if card.fingerprint is None and card.text_fingerprint is None:
        return
    if is_standin(asdict(card)):
        yield Origin("encoder: a stand-in with RANDOM WEIGHTS, in the published network's file format", "none needed")
        return
    packages = [found.get("package") for found in (card.fingerprint, card.text_fingerprint) if found]
    for package in dict.fromkeys(str(package) for package in packages if package):
        yield Origin(f"weights of the package {package}", _licence(package.partition(" ")[0]))
    if config.encoder.checkpoint is not None:
        yield _checkpoint(config.encoder.checkpoint, card.fingerprint or {})


def _licence(package: str) -> str | None:
    """What an installed package says of its licence."""
    try:
        found = metadata.metadata(package).json
    except metadata.PackageNotFoundError:
        return None
    stated = found.get("license_expression") or found.get("license")
    return None if stated in (None, "", "UNKNOWN") else str(stated)


def _checkpoint(path: Path, fingerprint: Mapping[str, object]) -> Origin:
    sources = load_sources(DEFAULT_SOURCES)
    source = sources.checkpoint(path.name)
    if source is None:
        return Origin(f"encoder: {path.name}", None)
    locked = Lockfile(sources.lock_path).get(f"{source.name}/{path.name}")
    used = fingerprint.get("checkpoint")
    if locked is not None and used is not None and used != locked.sha256:
        raise ConfigError(
            f"encoder.checkpoint is {path}, but the features were made with another file (SHA-256 {used}) than the one "
            f"that {sources.lock_path} has for this name ({locked.sha256}); give it a name of its own"
        )
    checked = "not compared with a lock file" if locked is None else f"SHA-256 as in {sources.lock_path}"
    return _published(f"encoder: {path.name}, {source.purpose} ({checked})", source)


def _data(config: Config, card: Card) -> Origin:
    if is_synthetic(asdict(card)):
        return Origin("data: EgoSynth, rendered by this software", "MIT")
    source = load_sources(DEFAULT_SOURCES).datasets.get(config.data.name)
    if source is None:
        return Origin(f"data: {config.data.name}", None)
    return _published(f"data: {config.data.name}, {source.purpose}", source)


def _published(what: str, source: Source) -> Origin:
    return Origin(what, f"{source.terms}; see {source.page}")
