"""Reads and checks `data_sources.yaml`, which lists where data sets, checkpoints and tokenizers are published."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from egopatch.configs.schema import ConfigError
from egopatch.configs.yaml_faults import read_yaml

DEFAULT_SOURCES = Path(__file__).with_name("data_sources.yaml")
DEFAULT_LOCK = Path("data_sources.lock.json")
SECTIONS = ("datasets", "checkpoints", "tokenizers")


@dataclass(frozen=True)
class Source:
    """Files that are published together.

    Attributes:
        name: Key in the YAML file.
        purpose: What the files are and who needs them.
        terms: Licence note.
        page: Web page that lists the links.
        files: Folders that each file unpacks to, by file name; empty for a file that is used as it is.
        url: Link without `/FILE`; None if there is no direct link.
        by_hand: What to do in a browser; None if there is a direct link.
    """

    name: str
    purpose: str
    terms: str
    page: str
    files: Mapping[str, tuple[str, ...]]
    url: str | None = None
    by_hand: str | None = None

    def __post_init__(self) -> None:
        if (self.url is None) == (self.by_hand is None):
            raise ValueError(f"{self.name}: has url {self.url!r} and by_hand {self.by_hand!r}; expected one of the two")
        for key in ("purpose", "terms", "page"):
            value = getattr(self, key)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{self.name}: {key} is {value!r}; expected a line of text")
        if self.url is not None and urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"{self.name}: url is {self.url!r}; expected an http or https link")
        for path in (*self.files, *(folder for folders in self.files.values() for folder in folders)):
            if not isinstance(path, str) or not path or Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"{self.name}: files names {path!r}; expected names without '..' and leading '/'")

    def link(self, file: str) -> str | None:
        """Direct link to a file; None if there is none."""
        return None if self.url is None else f"{self.url}/{file}"


@dataclass(frozen=True)
class Sources:
    """Every published source, each section by name.

    Attributes:
        path: The YAML file.
        datasets: Sources by `data.name`.
        checkpoints: Sources by any name; a checkpoint is found by its file name.
        tokenizers: Sources by the name of the folder that holds the tokenizer.
    """

    path: Path
    datasets: Mapping[str, Source]
    checkpoints: Mapping[str, Source]
    tokenizers: Mapping[str, Source]

    @property
    def lock_path(self) -> Path:
        """The lock file: beside a user's own YAML file, in the current directory for the packaged one."""
        packaged = self.path.resolve() == DEFAULT_SOURCES.resolve()
        return DEFAULT_LOCK if packaged else self.path.with_suffix(".lock.json")

    def checkpoint(self, file: str) -> Source | None:
        """The source of the checkpoint with this file name; None if there is none."""
        return next((source for source in self.checkpoints.values() if file in source.files), None)


def load_sources(path: Path) -> Sources:
    """Read the YAML file.

    Raises:
        ConfigError: The file is missing or malformed; the message names the entry.
    """
    try:
        tree = read_yaml(path)
    except ValueError as error:
        raise ConfigError(f"sources file {path}: {error}") from None
    if not isinstance(tree, dict) or set(tree) != set(SECTIONS):
        found = ", ".join(map(str, tree)) if isinstance(tree, dict) else repr(tree)
        raise ConfigError(f"sources file {path} has sections {found}; expected {', '.join(SECTIONS)}")
    try:
        read = {section: {name: _source(name, entry) for name, entry in tree[section].items()} for section in SECTIONS}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"sources file {path}: {error}") from None
    return Sources(path, **read)


def _source(name: str, entry: Any) -> Source:
    known = [field.name for field in fields(Source) if field.name != "name"]
    if not isinstance(entry, dict) or not set(entry) <= set(known) or not entry.get("files"):
        found = ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)
        raise ValueError(f"{name}: has {found}; expected files and some of {', '.join(known)}")
    files = entry["files"]
    pairs = files.items() if isinstance(files, dict) else [(file, []) for file in _listed(name, files)]
    folders = {file: tuple(_listed(name, unpacked)) for file, unpacked in pairs}
    return Source(
        name=name,
        **{key: entry.get(key, "") for key in ("purpose", "terms", "page")},
        files=folders,
        url=entry.get("url"),
        by_hand=entry.get("by_hand"),
    )


def _listed(name: str, names: Any) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(file, str) for file in names):
        raise ValueError(f"{name}: files has {names!r}; expected a list of names")
    return names
