"""What is in a checkpoint, and its conversion to safetensors."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from egopatch.extract.encoders.checkpoints.checkpoint import PUBLISHED, Checkpoint, CheckpointError, load_checkpoint
from egopatch.extract.encoders.layers.video_encoder import VideoSizes

# Heads of pretraining that no path of ours reads.
UNUSED = re.compile(r"mlm_score\.|itm_score\.|cross_modal_\w+\.|.*\.position_ids$|.*\.num_batches_tracked$")


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        path, bytes, sha256: of the file.
        container: `state_dict`, `model_state_dict`, `bare` or `safetensors`.
        network: EgoVLP, EgoVLPv2 or MFAS.
        width: D. blocks: of the video network. fusion: first fused block, None without. text_layers: of the text
        network. frames: temporal positions. grid: (rows, cols) of patches. size: side of the input in pixels.
        answers: width of the classifier, None without.
        tensors, parameters: how many of them.
        missing: tensors that the network needs, and that are absent.
        unexpected: tensors that the network has no place for.
        reshaped: tensors whose shape does not go with the others, as `name: found, expected`.
        unused: tensors of the published network that no path of ours reads.
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
        """Whether every path of the network can be loaded, but for the classifier of a pretrained one."""
        return not self.missing and not self.reshaped

    def lines(self) -> list[str]:
        """The findings as text, a line each."""
        fused = "no fused blocks" if self.fusion is None else f"fused from block {self.fusion}"
        answers = "no classifier (pretraining)" if self.answers is None else f"classifier of {self.answers} answers"
        lines = [
            f"{self.path}: {self.network}, {self.bytes:,} bytes, tensors under {self.container}",
            f"sha256 {self.sha256}",
            f"{self.blocks} video blocks, {fused}; {self.text_layers} text layers; {answers}",
            f"{self.frames} frames of {self.size}x{self.size} pixels, {self.grid[0]}x{self.grid[1]} patches, "
            f"{self.width} channels",
            f"{self.tensors} tensors, {self.parameters:,} parameters; {len(self.unused)} tensors are not used here",
        ]
        for title in ("missing", "unexpected", "reshaped"):
            found = getattr(self, title)
            lines.append(f"{title}: {len(found)}" + "".join(f"\n  {name}" for name in found))
        return lines

    def as_dict(self) -> dict[str, object]:
        """The findings as JSON takes them."""
        return {**dataclasses.asdict(self), "path": str(self.path), "complete": self.complete}


def inspect(path: Path | str) -> Inspection:
    """Say what a checkpoint is and what it has, lacks, or has too much of.

    Raises:
        CheckpointError: unreadable, or of a network that is not known here.
    """
    checkpoint = load_checkpoint(path)
    network = checkpoint.network
    if network not in PUBLISHED:
        raise CheckpointError(
            f"{checkpoint.path}: its tensors are of no published network; expected {', '.join(PUBLISHED.values())}"
        )
    sizes = VideoSizes.of(checkpoint)
    root = "transformer" if network == "egovlp" else "encoder"
    text_layers = checkpoint.count(rf"text_model\.{root}\.layer\.(\d+)\.")
    classifier = checkpoint.tensors.get("projector_2.weight")
    expected = _expected(checkpoint, sizes, text_layers)
    tensors = checkpoint.tensors
    unused = tuple(name for name in tensors if UNUSED.match(name))
    return Inspection(
        path=checkpoint.path,
        bytes=checkpoint.path.stat().st_size,
        sha256=checkpoint.sha256,
        container=checkpoint.container,
        network=PUBLISHED[network],
        width=sizes.width,
        blocks=sizes.blocks,
        fusion=sizes.fusion if sizes.fusion < sizes.blocks else None,
        text_layers=text_layers,
        frames=sizes.frames,
        grid=sizes.grid,
        size=sizes.grid[0] * sizes.patch,
        answers=None if classifier is None else classifier.shape[0],
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


def convert(path: Path | str, out: Path | str) -> Inspection:
    """Write what our paths use of a checkpoint as safetensors, and inspect the result.

    What was converted before is written again byte for byte.

    Args:
        path: checkpoint in any container that `load_checkpoint` takes.
        out: `.safetensors` file to write; it appears complete or not at all.

    Raises:
        CheckpointError: as `inspect`; or the checkpoint is incomplete, or `out` has another suffix.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: expected a file name that ends in .safetensors")
    found = inspect(path)
    if not found.complete:
        lacks = [*found.missing, *found.reshaped]
        raise CheckpointError(
            f"{found.path}: {len(lacks)} tensors are missing or re-shaped, the first is {lacks[0]}; inspect shows all"
        )
    checkpoint = load_checkpoint(path)
    dropped = {*found.unused, *found.unexpected}
    kept = {name: tensor.contiguous().clone() for name, tensor in checkpoint.tensors.items() if name not in dropped}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    try:
        save_file(kept, partial, metadata={"source_sha256": _origin(checkpoint)})
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return inspect(out)


def _origin(checkpoint: Checkpoint) -> str:
    """SHA-256 of the published file: a converted one names it."""
    if checkpoint.container != "safetensors":
        return checkpoint.sha256
    with safe_open(checkpoint.path, "pt") as file:
        return (file.metadata() or {}).get("source_sha256", checkpoint.sha256)


def _expected(checkpoint: Checkpoint, sizes: VideoSizes, text_layers: int) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor that the recognised network's paths read, by the sizes it has."""
    from egopatch.extract.encoders.checkpoints import standin  # the published names and shapes live there

    network = checkpoint.network
    width = sizes.width
    vocabulary = _rows(checkpoint, "text_model.embeddings.word_embeddings.weight")
    joint = _rows(checkpoint, "vid_proj.0.weight")
    answers = _rows(checkpoint, "projector_2.weight") if "projector_2.weight" in checkpoint.tensors else None
    shapes = standin.published_shapes(
        "egovlp" if network == "egovlp" else "egovlpv2",
        width=width,
        depth=sizes.blocks,
        text_layers=text_layers,
        fusion=sizes.fusion,
        frames=sizes.frames,
        patches=sizes.patches,
        patch=sizes.patch,
        vocabulary=vocabulary,
        positions=_rows(checkpoint, "text_model.embeddings.position_embeddings.weight"),
        joint=joint,
        answers=answers,
    )
    expected = {name: shape for name, shape in shapes.items() if not UNUSED.match(name)}
    if network == "mfas":
        lower = [f"video_model.blocks.{i}." for i in range(sizes.fusion)]
        expected |= {
            name.replace("blocks.", "cloned_blocks.", 1): shape
            for name, shape in shapes.items()
            if name.startswith(tuple(lower))
        }
        expected |= {"alpha": (1,), "belta": (1,), "video_model.large_pos_embed": (1, sizes.patches // 4, width)}
    return expected


def _rows(checkpoint: Checkpoint, name: str) -> int:
    tensor: Tensor | None = checkpoint.tensors.get(name)
    return 0 if tensor is None or tensor.ndim == 0 else tensor.shape[0]
