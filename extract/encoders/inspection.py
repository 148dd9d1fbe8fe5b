"""Reports on checkpoints (network, sizes, missing tensors), and conversion to safetensors."""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from egopatch.extract.encoders.checkpoints.checkpoint import (
    PUBLISHED_NETWORKS,
    Checkpoint,
    CheckpointError,
    list_some,
    load_checkpoint,
)
from egopatch.extract.encoders.checkpoints.standin import published_shapes
from egopatch.extract.encoders.layers.projection import text_layers
from egopatch.extract.encoders.layers.spacetime import VideoSizes
from egopatch.features.common.units import counted
from egopatch.features.io.files import replacing

# Tensors that no encoder or head here reads: the pretraining heads, and buffers.
UNUSED = re.compile(r"mlm_score\.|itm_score\.|cross_modal_\w+\.|.*\.position_ids$|.*\.num_batches_tracked$")


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint contains, and what is wrong with it.

    Attributes:
        path: Path of the file.
        bytes: Size of the file.
        sha256: SHA-256 of the file, in hex.
        container: Where the tensors are; see `Checkpoint`.
        network: EgoVLP, EgoVLPv2 or MFAS.
        width: Channels of a token, D.
        blocks: Number of blocks of the video network.
        fusion: First fused block; None if no block is fused.
        text_layers: Number of layers of the text network.
        frames: Number of temporal positions.
        grid: (rows, cols) of patches.
        size: Side of the input in pixels.
        answers: Number of classes; None if there is no classifier.
        tensors: Number of tensors.
        parameters: Number of floating-point values.
        missing: Tensors that the network needs and the file does not have.
        unexpected: Tensors that do not belong to the network.
        reshaped: Tensors with the wrong shape, as `name: found, expected`.
        unused: Tensors of the published network that are not used here.
    """

    path: Path
    bytes: int
    sha256: str
    container: str
    network: str
    width: int
    blocks: int
    fusion: int | None
    text_layers: int
    frames: int
    grid: tuple[int, int]
    size: int
    answers: int | None
    tensors: int
    parameters: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the whole network can be loaded; a pretrained one needs no classifier."""
        return not self.missing and not self.reshaped

    def require_complete(self) -> None:
        """Refuse an incomplete checkpoint.

        Raises:
            CheckpointError: Tensors are missing or have the wrong shape.
        """
        if faults := [*self.missing, *self.reshaped]:
            raise CheckpointError(
                f"{self.path}: {counted(len(faults), 'tensor is', 'tensors are')} missing or of the wrong shape; the "
                f"first is {faults[0]}; `egopatch extract checkpoint inspect {shlex.quote(str(self.path))}` lists all "
                "of them"
            )

    def lines(self) -> list[str]:
        """The report as lines of text."""
        fused = "no fused blocks" if self.fusion is None else f"fused from block {self.fusion}"
        answers = (
            "no classifier (pretraining)"
            if self.answers is None
            else f"classifier of {counted(self.answers, 'answer')}"
        )
        lines = [
            f"{self.path}: {self.network}, {self.bytes:,} bytes, tensors under {self.container}",
            f"sha256 {self.sha256}",
            f"{counted(self.blocks, 'video block')}, {fused}; {counted(self.text_layers, 'text layer')}; {answers}",
            f"{counted(self.frames, 'frame')} of {self.size}x{self.size} pixels, "
            f"{self.grid[0]}x{self.grid[1]} patches, {self.width} channels",
            f"{counted(self.tensors, 'tensor')}, {self.parameters:,} parameters; "
            f"{counted(len(self.unused), 'tensor is', 'tensors are')} not used here",
        ]
        listed = {
            "missing tensors": self.missing,
            "unexpected tensors": self.unexpected,
            "tensors with the wrong shape": self.reshaped,
        }
        for title, names in listed.items():
            lines.append(f"{title}: {len(names)}" + "".join(f"\n  {name}" for name in names))
        return lines

    def as_dict(self) -> dict[str, object]:
        """The report as JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path), "complete": self.complete}


def inspect_checkpoint(path: Path | str) -> CheckpointReport:
    """Identify a checkpoint and list its missing and unexpected tensors.

    Raises:
        CheckpointError: The file is unreadable, or holds none of the published networks.
    """
    checkpoint = load_checkpoint(path)
    network = checkpoint.network
    if network not in PUBLISHED_NETWORKS:
        raise CheckpointError(
            f"{checkpoint.path}: its tensors (under {checkpoint.container}: {list_some([*checkpoint.tensors])}) belong "
            f"to none of the published networks; expected {', '.join(PUBLISHED_NETWORKS.values())}"
        )
    sizes = VideoSizes.of(checkpoint)
    expected = _expected(checkpoint, sizes)
    tensors = checkpoint.tensors
    unused = tuple(name for name in tensors if UNUSED.match(name))
    return CheckpointReport(
        path=checkpoint.path,
        bytes=checkpoint.path.stat().st_size,
        sha256=checkpoint.sha256,
        container=checkpoint.container,
        network=PUBLISHED_NETWORKS[network],
        width=sizes.width,
        blocks=sizes.blocks,
        fusion=sizes.fusion if sizes.fusion < sizes.blocks else None,
        text_layers=text_layers(checkpoint),
        frames=sizes.frames,
        grid=sizes.grid,
        size=sizes.grid[0] * sizes.patch,
        answers=_answers(checkpoint),
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()),
        missing=tuple(name for name in expected if name not in tensors),
        unexpected=tuple(name for name in tensors if name not in expected and name not in unused),
        reshaped=tuple(
            f"{name}: {tuple(tensors[name].shape)}, expected {shape}"
            for name, shape in expected.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ),
        unused=unused,
    )


def convert_checkpoint(path: Path | str, out: Path | str) -> CheckpointReport:
    """Write those tensors of a checkpoint that are used here to a safetensors file, and report on that file.

    Converting a converted file again gives the same bytes.

    Args:
        path: Checkpoint in any container that `load_checkpoint` reads.
        out: `.safetensors` file to write; it appears complete or not at all.

    Raises:
        CheckpointError: As for `inspect_checkpoint`; or the checkpoint is incomplete, or `out` has another suffix.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: expected a file name that ends in .safetensors")
    found = inspect_checkpoint(path)
    found.require_complete()
    checkpoint = load_checkpoint(path)
    dropped = {*found.unused, *found.unexpected}
    kept = {name: tensor.contiguous().clone() for name, tensor in checkpoint.tensors.items() if name not in dropped}
    with replacing(out) as new:
        # safetensors' own `save_file` makes files that only their owner can read.
        new.write_bytes(save(kept, metadata={"source_sha256": _origin(checkpoint)}))
    return inspect_checkpoint(out)


def _origin(checkpoint: Checkpoint) -> str:
    """SHA-256 of the published file, which a converted file names in its metadata."""
    if checkpoint.container != "safetensors":
        return checkpoint.sha256
    with safe_open(checkpoint.path, "pt") as file:
        return (file.metadata() or {}).get("source_sha256", checkpoint.sha256)


def _expected(checkpoint: Checkpoint, sizes: VideoSizes) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor that a complete checkpoint of this network and these sizes has."""
    shapes = published_shapes(
        "egovlp" if checkpoint.network == "egovlp" else "egovlpv2",
        width=sizes.width,
        depth=sizes.blocks,
        text_layers=text_layers(checkpoint),
        fusion=sizes.fusion,
        frames=sizes.frames,
        patches=sizes.patches,
        patch=sizes.patch,
        vocabulary=_rows(checkpoint, "text_model.embeddings.word_embeddings.weight"),
        positions=_rows(checkpoint, "text_model.embeddings.position_embeddings.weight"),
        joint=_rows(checkpoint, "vid_proj.0.weight"),
        answers=_answers(checkpoint),
    )
    expected = {name: shape for name, shape in shapes.items() if not UNUSED.match(name)}
    if checkpoint.network == "mfas":
        lower = tuple(f"video_model.blocks.{i}." for i in range(sizes.fusion))
        expected |= {
            name.replace("blocks.", "cloned_blocks.", 1): shape
            for name, shape in shapes.items()
            if name.startswith(lower)
        }
        expected |= {"alpha": (1,), "belta": (1,), "video_model.large_pos_embed": (1, sizes.patches // 4, sizes.width)}
    return expected


def _answers(checkpoint: Checkpoint) -> int | None:
    """Number of classes; None if there is no classifier."""
    return _rows(checkpoint, "projector_2.weight") if "projector_2.weight" in checkpoint.tensors else None


def _rows(checkpoint: Checkpoint, name: str) -> int:
    tensor: Tensor | None = checkpoint.tensors.get(name)
    return 0 if tensor is None or tensor.ndim == 0 else tensor.shape[0]
