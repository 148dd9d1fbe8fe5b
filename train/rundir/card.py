"""A run's folder: the model card beside the weights, the resolved config, and files that appear whole or not at all."""

import dataclasses
import json
import os
import pickle
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from egopatch.configs.schema import Config, ConfigError

CARD, WEIGHTS, LAST, CONFIG, LOG = "card.json", "best.safetensors", "last.pt", "config.yaml", "log.jsonl"
TEST, PREDICTIONS, SELECTION = "test.json", "predictions.jsonl", "selection.npz"
# Options that decide a run's numbers. A folder holds one setting of them.
DECISIVE = ("data", "head", "train")
INCIDENTAL = {"head.implementation", "train.device", "train.residency"}


class RunError(ValueError):
    """A run's folder that cannot be used as asked."""


@dataclass(frozen=True)
class Card:
    """What a head's weights are: enough to open the right store, build the head and read its answers.

    Attributes:
        model: `head.name`.
        config: the resolved config.
        fingerprint: of the clips' store; None for heads that read no video.
        text_fingerprint: of the texts' store; None for heads that read none.
        answers: the vocabulary; the index is the class.
        seed: of the training.
        best_epoch: epoch, counted from 1, that was best on *val*.
        val: accuracies of that epoch, percent: `open`, `binary`, `all`.
        versions: of what computed it.
        command: that trained it.
        parameters: learned numbers in the head.
    """

    model: str
    config: Mapping[str, Any]
    fingerprint: Mapping[str, Any] | None
    text_fingerprint: Mapping[str, Any] | None
    answers: tuple[str, ...]
    seed: int
    best_epoch: int
    val: Mapping[str, float | None]
    versions: Mapping[str, str]
    command: str
    parameters: int

    def write(self, folder: Path) -> None:
        """Write `card.json`."""
        write_whole(folder / CARD, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Read `card.json`.

        Raises:
            RunError: it is missing or damaged.
        """
        path = folder / CARD
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["answers"] = tuple(values["answers"])
            return cls(**values)
        except FileNotFoundError:
            raise RunError(f"{path}: no such file; train the head first: python -m train fit --config CONFIG") from None
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is no model card ({error}); delete the folder and train again") from None


def versions() -> dict[str, str]:
    """Of what computes a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy", "zarr")}}


def plain(config: Config) -> dict[str, Any]:
    """A config as JSON and YAML can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader or a crash sees the old one or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    new.replace(path)


def save_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `best.safetensors`."""
    new = folder / (WEIGHTS + ".new")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new)
    new.replace(folder / WEIGHTS)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read `best.safetensors`.

    Raises:
        RunError: it is missing.
    """
    path = folder / WEIGHTS
    if not path.exists():
        raise RunError(f"{path}: no such file; train the head first: python -m train fit --config CONFIG")
    return load_file(path)


def save_last(path: Path, state: Mapping[str, Any]) -> None:
    """Write a crew's file, from which training goes on."""
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def load_last(path: Path) -> dict[str, Any] | None:
    """Read a crew's file; None where there is none."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} is damaged ({reason}); delete it to train from the start") from None


def claim(folder: Path, config: Config) -> None:
    """Make the folder and write `config.yaml`, or check that it already holds this very setting.

    Raises:
        ConfigError: the folder holds a run of another setting; the message names the differing options.
    """
    path = folder / CONFIG
    here = plain(config)
    if path.exists():
        there = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        apart = [
            f"{section}.{name} is {value!r} here, {(there.get(section) or {}).get(name)!r} there"
            for section in DECISIVE
            for name, value in here[section].items()
            if f"{section}.{name}" not in INCIDENTAL and (there.get(section) or {}).get(name) != value
        ]
        if apart:
            raise ConfigError(
                f"run.dir {folder} holds a run of another config ({'; '.join(apart)}); "
                "expected the same, an empty folder, or another --run.dir"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(here, sort_keys=False))
