"""A run's folder: the config that claims it, its weights, and files that are complete or absent."""

import dataclasses
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from egopatch.configs.schema import Config, ConfigError
from egopatch.features.io.files import replacing
from egopatch.features.state.header import HEADER
from egopatch.train.rundir.names import CONFIG, LAST, TEST, WEIGHTS
from egopatch.train.rundir.results import START_AGAIN

# torch takes seconds to import, and the table needs no weights.
if TYPE_CHECKING:
    from torch import Tensor

# Key of the epoch in the metadata of the weights.
EPOCH = "epoch"
# Sections that decide a run's numbers, and their options that do not: an interrupted run may resume with other values
# of those. Runs in one row of the table may differ in more (`rundir.results`), because they share no folder.
_DECISIVE = ("data", "head", "train")
_FREE_ON_RESUME = {"head.implementation", "train.device", "train.residency"}


class RunError(ValueError):
    """A run's folder is missing a file, or holds a damaged one; the message names it and says what to do."""


def is_rendered(root: Path) -> bool:
    """Whether the data set at `root` is EgoSynth, whose renderer leaves an event log there; no recorded set has one."""
    return (root / "events.jsonl").exists()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "zarr")}}


def plain(config: Config) -> dict[str, Any]:
    """A config as plain values that JSON and YAML can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file: readers, and a crash, see the old one or the new one."""
    with replacing(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def save_weights(folder: Path, tensors: "Mapping[str, Tensor]", epoch: int) -> None:
    """Write `best.safetensors`, the weights after `epoch`."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors' own `save_file` makes files that only their owner can read.
    write_whole(folder / WEIGHTS, save(contiguous, {EPOCH: str(epoch)}))


def load_weights(folder: Path, epoch: int) -> "dict[str, Tensor]":
    """Read `best.safetensors`.

    Raises:
        RunError: The file is missing or damaged, or holds the weights of another epoch than `epoch`.
    """
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.exists():
        raise RunError(f"{path}: no such file, but the run was trained; {START_AGAIN}")
    found = weights_epoch(folder)
    if found not in (None, epoch):
        raise RunError(
            f"{path} holds the weights of epoch {found}, expected those of epoch {epoch}, the best on val; "
            f"{START_AGAIN}"
        )
    return load_file(path)


def weights_epoch(folder: Path) -> int | None:
    """Epoch of the weights in `best.safetensors`; None if the file is missing, or an earlier version wrote it.

    Raises:
        RunError: The file is damaged.
    """
    path = folder / WEIGHTS
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            epoch = (file.metadata() or {}).get(EPOCH)
            return None if epoch is None else int(epoch)
    except (SafetensorError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}); {START_AGAIN}") from None


def claim(folder: Path, config: Config) -> None:
    """Write `config.yaml`. The caller holds the folder's lease.

    Raises:
        ConfigError: As `require_same_settings`.
    """
    require_same_settings(folder, config)
    write_whole(folder / CONFIG, yaml.safe_dump(plain(config), sort_keys=False))


def require_same_settings(folder: Path, config: Config, option: str = "--run.dir") -> None:
    """Check that the folder's `config.yaml`, if there is one, has the same settings.

    For options that an earlier version did not have, the default counts.

    Args:
        option: Option that chooses another folder, for the message.

    Raises:
        ConfigError: `folder` is a store; or it holds a run with other settings, and the message names the differing
            options; or results of a head that was trained elsewhere; or its `config.yaml` is damaged.
    """
    path = folder / CONFIG
    if (folder / HEADER).exists():
        raise ConfigError(f"run.dir is {folder}, which is a store; expected a folder of its own for the run")
    try:
        existing = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if is_finished(folder) and not (folder / WEIGHTS).exists():
            raise ConfigError(
                f"run.dir {folder} holds results of a head that was trained elsewhere (`train evaluate --from`); use "
                f"another {option}, or delete the folder"
            ) from None
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is damaged ({reason}); use another {option}, or delete the folder") from None
    if not isinstance(existing, dict) or not all(isinstance(section, dict | None) for section in existing.values()):
        raise ConfigError(
            f"{path} does not hold the sections of an experiment; use another {option}, or delete the folder"
        )
    requested, defaults = plain(config), plain(Config())
    held = {section: {**defaults[section], **(existing.get(section) or {})} for section in _DECISIVE}
    different = [
        f"{section}.{name}: folder has {held[section][name]!r}, requested {value!r}"
        for section in _DECISIVE
        for name, value in requested[section].items()
        if f"{section}.{name}" not in _FREE_ON_RESUME and held[section][name] != value
    ]
    if different:
        raise ConfigError(
            f"run.dir {folder} holds a run with different settings ({'; '.join(different)}); use another "
            f"{option} or the original settings"
        )


def require_untrained(folder: Path) -> None:
    """Check that no training began in the folder: results of another head would be taken for those of its own.

    Raises:
        RunError: There are weights, or the state of an interrupted training.
    """
    if any((folder / name).exists() for name in (WEIGHTS, LAST)):
        raise RunError(f"run.dir {folder} holds a head that was trained there; use another --run.dir")


def is_finished(folder: Path) -> bool:
    """Whether the folder holds a run with results."""
    return (folder / TEST).exists()
