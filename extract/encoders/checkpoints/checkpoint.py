"""Reads checkpoints without executing code that is in them.

A checkpoint is a safetensors file, or a file in PyTorch's format that holds a dict of tensors: bare, or under
`state_dict` (pretraining), `model_state_dict` (fine-tuning) or any other key where it can only be the network. Names
may have `module.`, `model.` and `_orig_mod.` added. Published pretraining files also pickle the training script's own
objects; those become inert stand-ins and are dropped.
"""

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from egopatch.extract.errors import CheckpointError
from egopatch.features.io.lfs import pointer_fault

CONTAINERS = ("state_dict", "model_state_dict")  # of the published files
# Prefixes that torch.compile, DataParallel and similar wrappers, and trainers' classes add to a tensor's name.
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
_WRAPPER = re.compile(r"^(module\.)+")
_TRAINER = re.compile(r"^((module|model)\.)+")
# Key that `recognise_network` returns -> the network's name for messages.
PUBLISHED_NETWORKS = {"egovlp": "EgoVLP", "egovlpv2": "EgoVLPv2", "mfas": "MFAS"}
NETWORK_NAMES = PUBLISHED_NETWORKS | {"lite": "EfficientNet-Lite0", "bert": "BERT"}
# Names that a message lists before it only counts.
SHOWN = 4


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a checkpoint file, by published name.

    Attributes:
        path: Path of the file.
        container: Where the tensors were found: the key, such as `state_dict`; `bare` or `safetensors`.
        tensors: Name to tensor; tensors may be memory-mapped from the file.
    """

    path: Path
    container: str
    tensors: Mapping[str, Tensor]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, in hex."""
        return file_sha256(self.path)

    @property
    def network(self) -> str | None:
        """Key in `NETWORK_NAMES` of the network whose tensors these are; None for an unknown network."""
        return recognise_network(self.tensors)

    def shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        """Shape of the tensor `name`, which must have `dimensions` dimensions unless that is None.

        Raises:
            CheckpointError: The tensor is missing, or has another number of dimensions.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: {self._described()} has no tensor {name!r}, which the network needs")
        shape = tuple(self.tensors[name].shape)
        if dimensions not in (None, len(shape)):
            raise CheckpointError(f"{self.path}: wrong shape: {name} is {shape}, expected {dimensions} dimensions")
        return shape

    def count(self, pattern: str) -> int:
        """1 + the highest number that group 1 of `pattern` matches in the names; 0 if it matches no name."""
        found = (re.match(pattern, name) for name in self.tensors)
        return max((int(m.group(1)) + 1 for m in found if m), default=0)

    def require(self, *networks: str) -> None:
        """Refuse a checkpoint of any other network than `networks`.

        Raises:
            CheckpointError: The checkpoint belongs to another network.
        """
        if self.network not in networks:
            wanted = " or ".join(NETWORK_NAMES[n] for n in networks)
            raise CheckpointError(
                f"{self.path}: {self._described()} was found where {wanted} is expected; "
                "set encoder.arch to the network that the checkpoint belongs to"
            )

    def fill(self, module: nn.Module, names: Mapping[str, str] | str = "") -> None:
        """Copy tensors into `module`, in the module's own dtype.

        Args:
            module: Module to fill completely; it may be on the meta device.
            names: Prefix of the module's names in the checkpoint, or a mapping from the module's names to those.

        Raises:
            CheckpointError: Tensors are missing or have the wrong shape; the message counts them and lists a few.
        """
        target = module.state_dict()
        source = names if not isinstance(names, str) else {name: names + name for name in target}
        missing = [source[name] for name in target if source[name] not in self.tensors]
        if missing:
            raise CheckpointError(f"{self.path}: {self._described()} is missing {list_some(missing)}")
        reshaped = [
            f"{source[n]} is {tuple(self.tensors[source[n]].shape)}, expected {tuple(t.shape)}"
            for n, t in target.items()
            if self.tensors[source[n]].shape != t.shape
        ]
        if reshaped:
            raise CheckpointError(f"{self.path}: wrong shape: {list_some(reshaped)}")
        filled = {n: self.tensors[source[n]].to(dtype=t.dtype, copy=True) for n, t in target.items()}
        module.load_state_dict(filled, assign=True)

    def _described(self) -> str:
        if self.network:
            return f"this {NETWORK_NAMES[self.network]} checkpoint"
        return f"this checkpoint of an unknown network (tensors under {self.container}: {list_some([*self.tensors])})"


def recognise_network(names: Iterable[str]) -> str | None:
    """Key in `NETWORK_NAMES` of the network that has tensors with these `names`; None for an unknown network."""
    found = set(names)
    if "_blocks.15._project_conv.weight" in found:
        return "lite"
    if "encoder.layer.0.attention.self.query.weight" in found:
        return "bert"
    if "video_model.blocks.0.timeattn.qkv.weight" not in found:
        return None
    if "video_model.cloned_blocks.0.attn.qkv.weight" in found:
        return "mfas"
    if "text_model.encoder.layer.0.attention.self.query.weight" in found:
        return "egovlpv2"
    return "egovlp" if "text_model.transformer.layer.0.attention.q_lin.weight" in found else None


def file_sha256(path: Path) -> str:
    """SHA-256 of the file at `path`, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: A `.pth`, `.pt` or `.tar` file written by `torch.save`, or a safetensors file with any suffix.

    Raises:
        CheckpointError: The file is missing, empty, damaged or not a checkpoint; it holds objects that are neither
            tensors nor known stand-ins, or two tensors with the same name; or it claims more data than it has.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; set encoder.checkpoint to the path of a file in it")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; set encoder.checkpoint to the path of a checkpoint file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    refuse_pointer(path)
    safe = _is_safetensors(path)
    content = _read_safetensors(path) if safe else _read_pickle(path)
    container, tensors = _unwrap(path, content)
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise CheckpointError(
                f"{path}: tensor {name!r} is sparse, nested, quantised or has no data; expected plain dense tensors"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: tensor {name!r} claims {tensor.numel()} elements, more than the file holds; refused"
            )
    if safe:
        container = "safetensors"
    return Checkpoint(path, container, tensors)


def refuse_pointer(path: Path) -> None:
    """Refuse a file that is a pointer of Git LFS.

    Raises:
        CheckpointError: The file is a pointer, or cannot be read.
    """
    try:
        fault = pointer_fault(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if fault:
        raise CheckpointError(f"{path} {fault}")


def _is_safetensors(path: Path) -> bool:
    """Whether the suffix is `.safetensors`, or the file starts with a header length (8 bytes) and a JSON header."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_line(error)})") from error


def _read_pickle(path: Path) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _refuse_compressed(path)
        with torch.serialization.safe_globals(_standins()), warnings.catch_warnings():
            # An unusual pickle either loads or is refused below; its warnings need no action from the user.
            warnings.simplefilter("ignore")
            # A memory-mapped file cannot return more bytes than it has, whatever its records claim.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if culprit:
            reason = f"it holds {culprit.group(1)}, which could run code; refused"
        else:
            detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
            reason = f"damaged or not a PyTorch checkpoint ({detail.group(1)[:160] if detail else 'not readable'})"
        raise CheckpointError(f"{path}: {reason}") from error
    except CheckpointError:
        raise
    except Exception as error:  # parsers raise many types over damaged bytes, all with this meaning
        raise CheckpointError(f"{path}: damaged or not a PyTorch checkpoint ({_line(error)})") from error


def _refuse_compressed(path: Path) -> None:
    """Refuse compressed records: PyTorch writes none, and one may expand a thousandfold."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path}: record {entry.filename!r} is compressed, but PyTorch never compresses records; refused"
                )


def _unwrap(path: Path, content: Any) -> tuple[str, dict[str, Tensor]]:
    """The key that holds the tensors, and the tensors by published name.

    Every key is searched, because training scripts agree on none; one that holds a known network is preferred.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors")
    inside = {str(key): _tensors_of(value) for key, value in content.items() if isinstance(value, dict)}
    places = {place: tensors for place, tensors in ({"bare": _tensors_of(content)} | inside).items() if tensors}
    if not places:
        raise CheckpointError(
            f"{path}: holds no tensors under its keys ({list_some([str(key) for key in content]) or 'none'}); "
            f"expected them under {' or '.join(CONTAINERS)}, or at the top level"
        )
    known = [place for place, tensors in places.items() if recognise_network(_published_names(tensors).values())]
    if len(known) > 1:
        raise CheckpointError(
            f"{path}: holds a network under each of {list_some(known)}; expected one network: save the one to use in "
            "a file of its own"
        )
    container = known[0] if known else next(place for place in (*CONTAINERS, *places) if place in places)
    tensors: dict[str, Tensor] = {}
    written: dict[str, str] = {}
    for key, name in _published_names(places[container]).items():
        if name in tensors:
            both = sorted((key, written[name]), key=len)
            raise CheckpointError(
                f"{path}: holds both {both[0]!r} and {both[1]!r}, which name the same tensor; remove one of them"
            )
        tensors[name], written[name] = places[container][key], key
    return container, tensors


def _tensors_of(value: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in value.items() if isinstance(key, str) and isinstance(tensor, Tensor)}


def _published_names(keys: Iterable[str]) -> dict[str, str]:
    """Key -> the tensor's published name, without the prefixes that DataParallel, torch.compile and trainers add.

    `model.` may be a part of the name, so it is removed only if that gives the names of a known network.
    """
    names = {key: _WRAPPER.sub("", _COMPILED.sub("", key)) for key in keys}
    if recognise_network(names.values()):
        return names
    deeper = {key: _TRAINER.sub("", name) for key, name in names.items()}
    return deeper if recognise_network(deeper.values()) else names


def _is_plain(tensor: Tensor) -> bool:
    dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return dense and tensor.device.type == "cpu"  # tensors without data are on `meta`


class _Inert:
    """Stand-in for a class of the training scripts: accepts any arguments, keeps none of them, does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Inert)


def _standins() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """A new inert class for each name that the published files pickle."""
    names = [
        "parse_config.ConfigParser",
        "parse_config_dist_multi.ConfigParser",
        "argparse.Namespace",
        *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "Path")),
        *(f"{module}.scalar" for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
        "numpy.dtype",
    ]
    return [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in names]


def list_some(items: list[str]) -> str:
    """The first of `items`, and how many more there are, for messages."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
