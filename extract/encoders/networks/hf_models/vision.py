"""Vision and video models of transformers, from their folder: DINOv2 and v3, CLIP, SigLIP, VideoMAE, V-JEPA 2 and more.

A vision model sees each frame separately; a video model may make one position in time out of several frames (a
tubelet). Tokens are the model's own states, in the order [T', N] whatever order the model uses. CLS is the model's
first prefix token (averaged over the frames of a vision model), else the mean of the patches.

Shape legend: B clips, T frames, T' positions in time, N patches of a frame, P prefix tokens, D channels, H heads.
"""

import math
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.checkpoints.folder import FolderCheckpoint
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder, check_depth
from egopatch.extract.encoders.networks.hf_models.loading import NO_GRID, load_model, require_fixed_grid
from egopatch.extract.encoders.networks.network import SaliencyKind, VideoOptions
from egopatch.features.common.units import counted
from egopatch.features.values.spec import PatchTokens

# Frames that a CPU runs through a vision model at a time; a whole batch would take gigabytes.
FRAMES = 16


@dataclass(frozen=True)
class Family:
    """Properties of the models of one `model_type`.

    Attributes:
        video: Whether the model sees all frames of a clip together.
        prefix: Number of tokens before the patches, without the registers, which the config counts.
        time_last: Whether the patches come in the order [N, T'].
        any_frames: Whether a video model takes other numbers of frames than it was trained on.
        options: Arguments of every call.
    """

    video: bool = False
    prefix: int = 1
    time_last: bool = False
    any_frames: bool = False
    options: tuple[tuple[str, Any], ...] = ()


FAMILIES = {
    "dinov2": Family(),
    "dinov2_with_registers": Family(),
    "dinov3_vit": Family(),
    "clip_vision_model": Family(),
    "siglip_vision_model": Family(prefix=0),
    "ijepa": Family(prefix=0),
    "deit": Family(prefix=2),
    "videomae": Family(video=True, prefix=0),
    "vivit": Family(video=True),
    "timesformer": Family(video=True, time_last=True, any_frames=True),
    "vjepa2": Family(video=True, prefix=0, any_frames=True, options=(("skip_predictor", True),)),
    "videoprism_vision_model": Family(video=True, prefix=0),
}


class HfEncoder(VideoEncoder):
    """Frames in, `PatchTokens` out."""

    _why_no_projection = "project has no meaning for hf: its video and text models are loaded separately"

    def __init__(
        self, model: PreTrainedModel, family: Family, depth: int, num_frames: int, size: int, saliency: SaliencyKind
    ) -> None:
        config = model.config
        tubelet, patch = _patch(config)
        super().__init__((size // patch, size // patch), int(config.hidden_size), depth, num_frames, size)
        self.model = model
        self.family = family
        self.trained_frames = getattr(config, "num_frames", None) if family.video else None
        self._steps = num_frames // tubelet if family.video else num_frames
        self.prefix = family.prefix + int(getattr(config, "num_register_tokens", 0) or 0)
        self.saliency: SaliencyKind = ("cls" if self.prefix else "norm") if saliency == "auto" else saliency
        self.identity = {
            "model_type": config.model_type,
            "tubelet": tubelet,
            "saliency": self.saliency,
            "transformers": version("transformers"),
        }
        self._last = depth == _blocks_of(config)
        _move_with(model)
        self._options = dict(family.options)
        if not self._last:  # they are the states after every block, gigabytes of a large batch
            self._options["output_hidden_states"] = True
        if self.saliency == "attention":
            self._options["output_attentions"] = True
        if size != _trained_size(config) and "interpolate_pos_encoding" in signature(model.forward).parameters:
            self._options["interpolate_pos_encoding"] = True
        self.eval().requires_grad_(False)

    @property
    def steps(self) -> int:
        """T', positions in time of the tokens."""
        return self._steps

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> PatchTokens:
        """Encode clips.

        Args:
            frames: [B, T, 3, size, size], normalised as the model's processor does it; on the encoder's device.

        Returns:
            patches [B, T', N, D] after block `depth`, after the last one with the final norm if the model has one;
            cls [B, D]; saliency [B, T', N] in float32: the cosine between CLS and each patch (`cls`), the length of
            each patch (`norm`), or the logarithm of CLS's attention to each patch, averaged over heads (`attention`).

        Raises:
            ValueError: As for `VideoEncoder.forward`.
        """
        self.check(frames)
        frames = frames.to(self.model.dtype)
        if self.family.video:
            states, attention = self._run(frames)
            prefix, body = states[:, : self.prefix], states[:, self.prefix :]
            order = "b (n t) d -> b t n d" if self.family.time_last else "b (t n) d -> b t n d"
            patches = rearrange(body, order, t=self.steps)
            heads = prefix[:, None, :1]  # [B, 1, 0 or 1, D]
        else:
            flat = rearrange(frames, "b t c h w -> (b t) c h w")
            parts = [self._run(part) for part in flat.split(FRAMES if flat.device.type == "cpu" else len(flat))]
            states = torch.cat([part for part, _ in parts])
            attention = torch.cat([part for _, part in parts if part is not None]) if parts[0][1] is not None else None
            patches = rearrange(states[:, self.prefix :], "(b t) n d -> b t n d", t=self.num_frames)
            heads = rearrange(states[:, : min(self.prefix, 1)], "(b t) p d -> b t p d", t=self.num_frames)
        if heads.shape[2] == 0:
            heads = reduce(patches.float(), "b t n d -> b 1 1 d", "mean").to(patches.dtype)
        cls = reduce(heads.float(), "b t 1 d -> b d", "mean").to(patches.dtype)
        return PatchTokens(cls, patches, self._saliency(patches, heads, attention))

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """States [., P + T' N, D] after block `depth`, and the attention of that block where the saliency needs it."""
        output = self.model(pixels, **self._options)
        states = output.last_hidden_state if self._last else output.hidden_states[self.depth]
        return states, output.attentions[self.depth - 1] if self.saliency == "attention" else None

    def _saliency(self, patches: Tensor, heads: Tensor, attention: Tensor | None) -> Tensor:
        if self.saliency == "norm":
            return patches.float().norm(dim=-1)
        if attention is None:
            return F.cosine_similarity(patches.float(), heads.float(), dim=-1)
        to_patches = attention[:, :, 0, self.prefix :].float().clamp_min(torch.finfo(torch.float32).tiny).log()
        rows = reduce(to_patches, "rows h n -> rows n", "mean")
        if rows.shape[1] == self.grid[0] * self.grid[1]:  # a row for each frame
            return rearrange(rows, "(b t) n -> b t n", t=self.steps)
        order = "b (n t) -> b t n" if self.family.time_last else "b (t n) -> b t n"
        return rearrange(rows, order, t=self.steps)


def build_video(checkpoint: Checkpoint, options: VideoOptions) -> HfEncoder:
    """The vision or video model in a folder, down to block `options.depth`.

    Raises:
        CheckpointError: Models of this kind have no grid of patches, the weights are incomplete or another model's, or
            the model does not take this depth, size or number of frames.
    """
    assert isinstance(checkpoint, FolderCheckpoint)
    eager = options.saliency == "attention"
    model = _vision_part(load_model(checkpoint, options.dtype, eager))
    config = model.config
    kind = config.model_type
    require_fixed_grid(checkpoint, kind)
    family = FAMILIES.get(kind, Family())
    _require_grid(checkpoint, config)
    blocks = _blocks_of(config)
    check_depth(options.depth, blocks, "the number of its blocks", checkpoint)
    if kind == "videoprism_vision_model" and options.depth != blocks:
        raise CheckpointError(
            f"{checkpoint.path}: depth is {options.depth}; a videoprism model runs whole, because its blocks see space "
            f"first and then time: set encoder.depth to {blocks}"
        )
    size = options.size or _trained_size(config)
    _check_input(checkpoint, model, family, size, options.num_frames)
    if kind != "videoprism_vision_model":
        _cut(model, options.depth, blocks)
    if eager and not family.prefix:
        raise CheckpointError(
            f"{checkpoint.path}: encoder.saliency is attention, but a {kind} model has no CLS token whose attention "
            "could be taken; expected cls or norm"
        )
    encoder = HfEncoder(model, family, options.depth, options.num_frames, size, options.saliency)
    _probe(checkpoint, encoder)
    return encoder


def _vision_part(model: PreTrainedModel) -> PreTrainedModel:
    """The vision half of a dual model, or the model itself."""
    for name in ("vision_model", "video_model"):
        part = getattr(model, name, None)
        if isinstance(part, PreTrainedModel):
            return part
    return model


def _require_grid(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Refuse a model whose config describes no blocks over patches, such as a convolutional or a text model."""
    try:
        int(config.hidden_size), _blocks_of(config), _patch(config), _trained_size(config)
    except (AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path} is a {config.model_type} model: {NO_GRID} ({error}); use a vision or video "
            "transformer, such as dinov2, clip, siglip or videomae"
        ) from error


def _blocks_of(config: PreTrainedConfig) -> int:
    if config.model_type == "videoprism_vision_model":
        return int(config.num_spatial_layers) + int(config.num_temporal_layers)
    return int(config.num_hidden_layers)


def _patch(config: PreTrainedConfig) -> tuple[int, int]:
    """Frames and pixels that a patch covers."""
    tubelet = getattr(config, "tubelet_size", 1)
    if not isinstance(tubelet, int):
        return int(tubelet[0]), int(tubelet[1])
    side = config.patch_size
    return tubelet, int(side if isinstance(side, int) else side[-1])


def _trained_size(config: PreTrainedConfig) -> int:
    size = getattr(config, "crop_size", None) or config.image_size
    return int(size if isinstance(size, int) else size[0])


def _check_input(checkpoint: Checkpoint, model: PreTrainedModel, family: Family, size: int, num_frames: int) -> None:
    """Refuse sizes and numbers of frames that the model does not take."""
    config = model.config
    tubelet, patch = _patch(config)
    where = f"{checkpoint.path}, a {config.model_type} model"
    if size % patch:
        raise CheckpointError(f"video.size is {size}; {where}, takes multiples of its {patch}-pixel patch")
    if config.model_type == "vjepa2" and size != config.crop_size:
        raise CheckpointError(
            f"video.size is {size}; {where}, takes only {config.crop_size}: set video.size to {config.crop_size}"
        )
    if not family.video:
        return
    if num_frames % tubelet:
        raise CheckpointError(
            f"video.frames is {num_frames}; {where}, makes one token from {tubelet} frames: use a multiple of {tubelet}"
        )
    if not family.any_frames and num_frames != config.num_frames:
        raise CheckpointError(
            f"video.frames is {num_frames}; {where}, was trained on {counted(config.num_frames, 'frame')} "
            "and takes no other number"
        )


def _move_with(model: PreTrainedModel) -> None:
    """Make plain tensors, such as VideoMAE's positions, buffers, so that they move with the model.

    Otherwise every batch would copy them to the GPU, which waits for the previous batch and is refused in a CUDA graph.
    """
    for module in model.modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
        for name, tensor in plain.items():
            delattr(module, name)
            module.register_buffer(name, tensor, persistent=False)


def _cut(model: PreTrainedModel, depth: int, blocks: int) -> None:
    """Drop the blocks above `depth`, which nothing needs."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == blocks]
    if lists:
        del lists[0][depth:]


def _probe(checkpoint: Checkpoint, encoder: HfEncoder) -> None:
    """Run a black clip, and refuse a model whose output does not match its config."""
    black = torch.zeros(1, encoder.num_frames, 3, encoder.size, encoder.size)
    pixels = black.to(encoder.model.dtype) if encoder.family.video else black[0, :1].to(encoder.model.dtype)
    kind = encoder.model.config.model_type
    try:
        with torch.inference_mode():
            states, _ = encoder._run(pixels)
    except Exception as error:  # every model refuses in its own way
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{checkpoint.path}: this {kind} model does not take {counted(encoder.num_frames, 'frame')} of "
            f"{encoder.size} pixels ({reason})"
        ) from error
    steps = encoder.steps if encoder.family.video else 1
    expected = (1, encoder.prefix + steps * math.prod(encoder.grid), encoder.width)
    if tuple(states.shape) != expected:
        raise CheckpointError(
            f"{checkpoint.path}: this {kind} model gives states of shape {tuple(states.shape)}; expected {expected}: "
            f"{encoder.prefix} prefix tokens, then {steps} x {encoder.grid[0]} x {encoder.grid[1]} patches"
        )
