"""The adapters of data sets by name, one file each.

Others come from the entry points `egopatch.datasets` of installed packages, each a function as `register_dataset` takes
it, and from `register_dataset`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from egopatch.configs.plugins import Plugins
from egopatch.configs.schema import ConfigError, DataConfig
from egopatch.extract.datasets import egoschema, egotaskqa, jsonl, nextqa, qaego4d
from egopatch.extract.datasets.records import Clip, Dataset, DatasetError

Loader = Callable[[DataConfig], Dataset]

LOADERS: dict[str, Loader] = {
    "egoschema": lambda data: egoschema.load(data.root, data.split),
    "egotaskqa": lambda data: egotaskqa.load(data.root, data.split, data.paraphrases),
    "jsonl": lambda data: jsonl.load(data.root / data.clips, _within(data, data.questions), data.root, data.split),
    "nextqa": lambda data: nextqa.load(data.root, data.split),
    "qaego4d": lambda data: qaego4d.load(data.root, data.split, close=False),
    "qaego4d-close": lambda data: qaego4d.load(data.root, data.split, close=True),
}


def _within(data: DataConfig, name: str | None) -> Path | None:
    return None if name is None else data.root / name


def _fault(name: str, load: object) -> str | None:
    if callable(load):
        return None
    return f"is of type {type(load).__name__}; expected a function from DataConfig to Dataset"


_PLUGINS: Plugins[Loader] = Plugins("data.name", "egopatch.datasets", LOADERS.keys(), _fault)


def register_dataset(name: str, load: Loader, replace: bool = False) -> None:
    """Let `data.name` name a data set in this process.

    Args:
        name: Value of the option.
        load: Reads clips, questions and answer vocabulary, and opens no video. It raises `DatasetError` for annotations
            that cannot be used.
        replace: Whether to replace what an earlier call registered under the name.

    Raises:
        ConfigError: The name is taken, or `load` cannot be called.
    """
    _PLUGINS.register(name, load, replace)


def load_dataset(data: DataConfig) -> Dataset:
    """Read the clips, questions and answer vocabulary of a data set. No video is opened.

    Raises:
        DatasetError: `data.root` does not exist, or annotation files are missing or malformed; one line per fault, with
            file and position.
        ConfigError: `data.name` is unknown, or what registers it is broken.
    """
    plugin = _PLUGINS.find(data.name)
    if plugin is None and not data.root.is_dir():
        expected = "set --data.root to the folder of the annotations"
        hint = "`egopatch extract data` downloads EgoTaskQA, `make demo` renders EgoSynth"
        raise DatasetError([f"data.root is '{data.root}', which does not exist; {expected} ({hint})"])
    dataset = (plugin or LOADERS[data.name])(data)
    if not isinstance(dataset, Dataset):
        owner = _PLUGINS.package_of(data.name) or "this process"
        raise ConfigError(
            f"data.name is {data.name!r}, but its function, which {owner} registers, returns a "
            f"{type(dataset).__name__}; expected an extract.datasets.Dataset"
        )
    if data.paraphrases and any(question.variants is None for question in dataset.questions.get("train", ())):
        raise ConfigError(f"data.paraphrases is true, but the data set {data.name} has no paraphrases; set it to false")
    return dataset


def load_clips(data: DataConfig) -> tuple[Clip, ...]:
    """The clips of a data set; questions in a file of their own are not read, because there may be a million.

    Raises:
        DatasetError, ConfigError: As `load_dataset`.
    """
    return load_dataset(dataclasses.replace(data, questions=None) if data.name == "jsonl" else data).clips
