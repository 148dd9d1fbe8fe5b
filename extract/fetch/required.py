"""The files that a config needs: archives, checkpoints and tokenizers, each with its path and its link."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.encoders import find_network, weights_path
from egopatch.extract.fetch.sources import Source, Sources


@dataclass(frozen=True)
class RequiredFile:
    """A file that a config needs.

    Attributes:
        name: `SOURCE/FILE`, its name in the lock file; the path itself for a file that is not published.
        file: Path of the file.
        source: Publisher of the file; None for the user's own.
        link: Direct link, if there is one.
        contents: Folders that the archive unpacks to, of which at least one must exist; empty for other files.
        folder: Folder to unpack to; None if the file is used as it is.
    """

    name: str
    file: Path
    source: Source | None = None
    link: str | None = None
    contents: tuple[Path, ...] = ()
    folder: Path | None = None

    @property
    def record(self) -> Path:
        """File beside the archive that records what was unpacked from it."""
        return self.file.with_name(f"{self.file.name}.unpacked.json")

    def read_record(self) -> dict[str, Any]:
        """Content of `record`; empty if it is missing or damaged."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def unpacked(self) -> bool:
        """Whether the archive was unpacked completely."""
        found = any(folder.is_dir() and any(folder.iterdir()) for folder in self.contents)
        return found and self.read_record().get("complete") is not False


def required_files(config: Config, sources: Sources) -> tuple[RequiredFile, ...]:
    """The files that `config` needs, in the order in which they are downloaded: small files first.

    Raises:
        ConfigError: A checkpoint or tokenizer neither exists nor is published.
    """
    encoder = config.encoder
    if find_network(encoder.arch).locate is not None:
        models = filter(None, (encoder.checkpoint, Path(config.text.model)))
        return (*(need for model in models for need in _model(model)), *_dataset(config, sources))
    checkpoints = {
        "encoder.checkpoint": weights_path(encoder.arch, encoder.checkpoint),
        "head.checkpoint": config.head.checkpoint,
    }
    named = (_checkpoint(option, file, sources) for option, file in checkpoints.items() if file is not None)
    return (*_tokenizer(config, sources), *named, *_dataset(config, sources))


def _model(folder: Path) -> Iterator[RequiredFile]:
    """The folder of a model; nothing for a name on the hub, whose own client downloads and caches it on first use."""
    from egopatch.extract.encoders.networks.hub import parse_hub_model  # imported here to save start-up time

    if folder.exists() or parse_hub_model(str(folder)) is None:
        yield RequiredFile(str(folder), folder)


def _tokenizer(config: Config, sources: Sources) -> Iterator[RequiredFile]:
    folder = Path(config.text.model)
    source = sources.tokenizers.get(folder.name)
    if source is not None and len(folder.parts) > 1:
        for file in source.files:
            yield RequiredFile(f"{source.name}/{file}", folder / file, source, source.link(file))
    elif folder.is_dir():
        yield RequiredFile(str(folder), folder)
    elif len(folder.parts) > 1:
        raise ConfigError(
            f"text.model is {config.text.model!r}, which does not exist, and {sources.path} lists no tokenizer of "
            f"that name (it lists {', '.join(sources.tokenizers)}); put it there, or name one of these"
        )
    # Otherwise it is a name on the hub, which transformers downloads and caches itself.


def _checkpoint(option: str, file: Path, sources: Sources) -> RequiredFile:
    source = sources.checkpoint(file.name)
    if source is not None:
        return RequiredFile(f"{source.name}/{file.name}", file, source, source.link(file.name))
    if file.is_file():
        return RequiredFile(str(file), file)
    known = ", ".join(name for source in sources.checkpoints.values() for name in source.files)
    raise ConfigError(
        f"{option} is {str(file)!r}, which does not exist, and {sources.path} lists no file of that name (it lists "
        f"{known}); put it there, or name one of these"
    )


def _dataset(config: Config, sources: Sources) -> Iterator[RequiredFile]:
    root = config.data.root
    source = sources.datasets.get(config.data.name)
    if source is None:
        for name in filter(None, (config.data.clips, config.data.questions)):
            yield RequiredFile(str(root / name), root / name)
        return
    for file, folders in source.files.items():
        if not folders:
            yield RequiredFile(f"{source.name}/{file}", root / file, source, source.link(file))
            continue
        contents = tuple(root / folder for folder in folders)
        yield RequiredFile(f"{source.name}/{file}", root / "archives" / file, source, source.link(file), contents, root)
