"""Networks for tests: full-size ones with formula weights, and tiny random ones. Shapes as in extract.encoders."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from egopatch.extract.encoders import load_video_encoder
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, load_checkpoint
from egopatch.extract.encoders.checkpoints.standin import write_standin
from egopatch.features.values.spec import PatchTokens
from tests.data.reference import formula

REFERENCE = Path(__file__).parents[2] / "data" / "reference"
CONTAINERS = ("state_dict", "model_state_dict", "bare", "safetensors")
TEXTS = ("what does the person hold?", "did the hand touch the red cup before the blue box?", "which one is open?")


class FormulaTensors(Mapping[str, Tensor]):
    """Tensors of a published network, each created on first access."""

    def __init__(self, network: str) -> None:
        self.shapes = json.loads((REFERENCE / f"{network}_keys.json").read_text())

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        return _formula_tensor(name, tuple(self.shapes[name]))


@cache
def _formula_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.asarray(formula.weight(name, shape), dtype=np.float32).reshape(shape))


@cache
def formula_checkpoint(network: str) -> Checkpoint:
    """The published network's tensors with formula weights, as a loaded checkpoint."""
    return Checkpoint(Path(f"{network}.pth"), "bare", FormulaTensors(network))


@cache
def recorded(network: str) -> dict[str, Tensor]:
    """Recorded outputs of the published code."""
    with np.load(REFERENCE / f"{network}_dev.npz") as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def dev_frames(frames: int) -> Tensor:
    """The video of the recordings, [1, T, 3, 224, 224]."""
    return torch.from_numpy(formula.frames(1, frames, key="dev"))


@cache
def published_fused6() -> PatchTokens:
    """EgoVLPv2's tokens of `dev_frames(16)` on the question-answering path, encoded once for all tests."""
    return load_video_encoder("egovlpv2", formula_checkpoint("egovlpv2"), 16, 6, "fused")(dev_frames(16))


def forget_full_size() -> None:
    """Free the tensors of the full-size networks, 1.6 GB, once no test needs them any more."""
    for cached in (_formula_tensor, formula_checkpoint, published_fused6):
        cached.cache_clear()


def sequence(tokens: PatchTokens) -> Tensor:
    """[B, 1 + T*N, D], CLS first."""
    return torch.cat([tokens.cls[:, None], tokens.patches.flatten(1, 2)], dim=1)


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def tiny(folder: Path, arch: str = "egovlpv2", **sizes: int) -> Checkpoint:
    """A tiny network, by default 4 blocks with fusion from block 2, 4x4 patches, 3 frames and 7 answers."""
    options = {"depth": 4, "fusion": 2, "frames": 3, "size": 64, "joint": 32} | sizes
    if arch == "mfas":
        return _with_coarse_tower(tiny(folder, **sizes))
    if arch == "egovlpv2":
        options.setdefault("answers", 7)
    return load_checkpoint(write_standin(arch, folder / f"{arch}.pth", texts=TEXTS, **options).checkpoint)


def _with_coarse_tower(base: Checkpoint) -> Checkpoint:
    random = torch.Generator().manual_seed(5)
    tensors = dict(base.tensors)
    for name, tensor in base.tensors.items():
        if name.startswith(("video_model.blocks.0.", "video_model.blocks.1.")):
            noise = 0.05 * torch.randn(tensor.shape, generator=random)
            tensors[name.replace("blocks", "cloned_blocks")] = tensor + noise
    patches, width = tensors["video_model.pos_embed"].shape[1:]
    tensors["video_model.large_pos_embed"] = 0.1 * torch.randn(1, (patches - 1) // 4, width, generator=random)
    tensors |= {"alpha": torch.tensor([0.3]), "belta": torch.tensor([0.2])}
    return Checkpoint(base.path, base.container, tensors)


def write_container(folder: Path, container: str, named: dict[str, Tensor]) -> Path:
    """A checkpoint file with tensors in one of the containers."""
    path = folder / ("file.safetensors" if container == "safetensors" else "file.tar")
    if container == "safetensors":
        save_file(named, path)
    elif container == "bare":
        torch.save(named, path)
    else:
        torch.save({container: named, "optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}}}, path)
    return path
