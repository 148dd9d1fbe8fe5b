"""Reads model folders that transformers wrote: checks that one is safe and complete, and reads its preprocessing."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError, file_sha256, refuse_pointer
from egopatch.extract.video.transforms import Resampling, Transform

_PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_RESAMPLING: dict[int, Resampling] = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


@dataclass(frozen=True)
class FolderCheckpoint(Checkpoint):
    """A model folder; its tensors stay in the files until transformers reads them.

    Attributes:
        settings: Content of `config.json`.
    """

    settings: dict[str, Any]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the names and hashes of `config.json` and of the weight files, in hex."""
        digest = hashlib.sha256()
        for file in (self.path / "config.json", *weight_files(self.path)):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        return digest.hexdigest()


def open_folder(path: Path) -> FolderCheckpoint:
    """Read what the folder at `path` holds, without its tensors.

    Raises:
        CheckpointError: The folder is missing or has no config, or its safetensors files are missing or incomplete,
            or a file is a pointer of Git LFS.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a folder; encoder.arch hf takes the folder of a transformers model: config.json, "
            "model.safetensors and preprocessor_config.json"
        )
    settings = _read_json(path / "config.json")
    if not isinstance(settings.get("model_type"), str):
        raise CheckpointError(f"{path / 'config.json'} names no model_type; expected a transformers model's config")
    for file in weight_files(path):
        refuse_pointer(file)
    return FolderCheckpoint(path, "transformers", {}, settings)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: one, or all that its index names.

    Raises:
        CheckpointError: There is none, one of several is missing, or the folder has only pickled weights.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file():
        if single.is_file():
            return [single]
        if (pickled := pickled_weights(file.name for file in folder.iterdir())) is not None:
            raise refuse_pickle(str(folder), pickled)
        raise CheckpointError(f"{folder} holds no weights; expected model.safetensors")
    parts = _read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; copy the model again")
    files = [folder / Path(name).name for name in sorted(set(parts.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names; copy the model again")
    return files


def pickled_weights(names: Iterable[str]) -> str | None:
    """The first of the files `names` that holds pickled weights; None if none does."""
    return next((name for name in sorted(names) if any(fnmatch(name, pattern) for pattern in _PICKLED)), None)


def refuse_pickle(owner: str, file: str) -> CheckpointError:
    """The error about a model that has its weights only in the pickled `file`."""
    return CheckpointError(
        f"{owner} has its weights in {file}, a pickle, which could run code; convert the model to safetensors "
        "(`model.save_pretrained(folder)`, if you trust the file)"
    )


def read_transform(folder: Path, size: int) -> Transform:
    """The preprocessing that a model folder describes, for frames of `size` pixels a side.

    If `size` is not the processor's own, its resizing is scaled with it, so that the same share of the frame is seen.

    Raises:
        CheckpointError: There is no description, or it asks for preprocessing that this program does not support.
    """
    path = next((folder / name for name in _PROCESSORS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder} has no preprocessor_config.json, which says how frames are resized and normalised; copy it from "
            "the model's page"
        )
    settings = _read_json(path)

    def refuse(name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: {name} is {settings.get(name)!r}; expected {expected}")

    resample = settings.get("resample", 2)
    if type(resample) is not int or resample not in _RESAMPLING:
        raise refuse("resample", "2 (bilinear) or 3 (bicubic)")
    mean, std = _normalisation(settings, refuse)
    if not settings.get("do_resize", True):
        raise refuse("do_resize", "true, because frames are larger than the model's input")
    resized, short_side, share = settings.get("size"), None, None
    cropped = settings.get("do_center_crop", "crop_size" in settings)
    if isinstance(resized, int):
        kind = str(settings.get("image_processor_type", settings.get("feature_extractor_type")))
        whole = not cropped or kind.startswith("DeiT")  # DeiT's processor squeezes the frame, the others keep its shape
        resized = {"height": resized, "width": resized} if whole else {"shortest_edge": resized}
    edge = _side(resized.get("shortest_edge")) if isinstance(resized, dict) else None
    if edge is not None:
        crop = _side(settings["crop_size"]) if cropped and "crop_size" in settings else edge
        if crop is None or crop > edge:
            raise refuse("crop_size", f"equal height and width, at most the shortest_edge, {edge}")
        short_side = round(edge * size / crop)
        share = size / short_side
    elif _side(resized) is None:
        raise refuse("size", "a shortest_edge, or equal height and width")
    elif cropped and _side(settings.get("crop_size", resized)) != _side(resized):
        raise refuse(
            "crop_size", f"{_side(resized)}, because frames that are squeezed into a square are not cropped here"
        )
    numbers = f"{short_side or 'whole'} {_RESAMPLING[resample]} {size} mean {mean} std {std}"
    return Transform(f"hf {numbers}", short_side, share, mean, std, _RESAMPLING[resample], antialias=True)


def _normalisation(
    settings: dict[str, Any], refuse: Callable[[str, str], CheckpointError]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1], with the processor's own rescaling included."""
    rescale = settings.get("rescale_factor", 1 / 255)
    if not _are_numbers([rescale]) or rescale <= 0:
        raise refuse("rescale_factor", "a positive number")
    factor = float(rescale) * 255 if settings.get("do_rescale", True) else 255.0
    shift = 1.0 if settings.get("do_rescale", True) and settings.get("offset", False) else 0.0
    numbers = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    if settings.get("do_normalize", True):
        for name in numbers:
            numbers[name] = settings.get(name)  # type: ignore[assignment]
            if not isinstance(numbers[name], list) or len(numbers[name]) != 3 or not _are_numbers(numbers[name]):
                raise refuse(name, "three numbers, for R, G and B")
        if min(numbers["image_std"]) <= 0:
            raise refuse("image_std", "three positive numbers")
    mean, std = numbers.values()
    return tuple((m + shift) / factor for m in mean), tuple(s / factor for s in std)


def _are_numbers(values: list[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _side(size: Any) -> int | None:
    """Side of a square size, in any of the ways that processors write it; None for anything else."""
    if isinstance(size, dict) and size.get("height") == size.get("width"):
        size = size.get("height")
    return size if type(size) is int and size > 0 else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; expected the folder of a transformers model") from error
    except (OSError, ValueError) as error:
        refuse_pointer(path)
        raise CheckpointError(f"{path} cannot be read ({' '.join(str(error).split())[:160]})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content
