"""The published networks as plain einsums over a checkpoint's tensors: the specification of the fast modules.

Nothing is fused, shared or skipped, and attention maps are materialised, as in the published code. The tests compare
the fast modules with these functions, and `benchmarks/encoder.py` times them.

Shape legend: B clips, T frames, N patches a frame, S = 1 + T*N, L text tokens, D channels, H heads of 64. `p` is the
checkpoint's tensors by published name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional as F

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Growth:
    """How MFAS selects: patches of a frame that may grow the region, and whether its score map is shifted by one."""

    top: int
    shifted: bool


PAPER = Growth(top=3, shifted=False)
RELEASED = Growth(top=1, shifted=True)


def embed(p: Tensors, frames: Tensor, cls: str, coarse_positions: bool = False) -> Tensor:
    """[B, T, 3, H, W] to positioned tokens [B, S, D], starting with the CLS token called `cls`."""
    b, t = frames.shape[:2]
    weight = p["video_model.patch_embed.proj.weight"]
    x = F.conv2d(frames.flatten(0, 1), weight, p["video_model.patch_embed.proj.bias"], stride=weight.shape[-1])
    x = rearrange(x, "(b t) d r c -> b t (r c) d", b=b)
    spatial = p["video_model.pos_embed"]
    x = x + spatial[:, None, 1:] + p["video_model.temporal_embed"][:, :t, None]
    if coarse_positions:
        side = round(p["video_model.large_pos_embed"].shape[1] ** 0.5)
        x = x + repeat(p["video_model.large_pos_embed"], "o (r c) d -> o 1 (r i c j) d", r=side, i=2, j=2)
    first = (p[cls] + spatial[:, :1]).expand(b, -1, -1)
    return torch.cat([first, x.flatten(1, 2)], dim=1)


def linear(p: Tensors, name: str, x: Tensor) -> Tensor:
    """The linear layer called `name`."""
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def norm(p: Tensors, name: str, x: Tensor, eps: float) -> Tensor:
    """The layer norm called `name`."""
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention, and its logits: q [..., I, 64], k and v [..., J, 64], `bias` added to the logits."""
    logits = torch.einsum("... i d, ... j d -> ... i j", q * q.shape[-1] ** -0.5, k)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return torch.einsum("... i j, ... j d -> ... i d", weights, v), logits


def divided(
    p: Tensors, name: str, x: Tensor, frames: int, axis: Literal["time", "space"], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Divided attention `name` of x [B, S, D]; `mask` [B, S] is added to the logits of its keys.

    Returns the projected result, and CLS's logits over all tokens [B, S], mean over heads, without the mask.
    """
    split = "b (t n) h d -> b h n t d" if axis == "time" else "b (t n) h d -> b h t n d"
    q, k, v = rearrange(linear(p, f"{name}.qkv", x), "b s (three h d) -> three b s h d", three=3, d=64)
    heads_first = [rearrange(y, "b s h d -> b h s d") for y in (q, k, v)]
    cls_bias = None if mask is None else mask[:, None, None]
    cls, logits = attend(heads_first[0][:, :, :1], heads_first[1], heads_first[2], cls_bias)
    q_, k_, v_ = (rearrange(y[:, 1:], split, t=frames) for y in (q, k, v))
    groups = q_.shape[2]
    k_ = torch.cat([repeat(k[:, 0], "b h d -> b h g 1 d", g=groups), k_], dim=3)
    v_ = torch.cat([repeat(v[:, 0], "b h d -> b h g 1 d", g=groups), v_], dim=3)
    bias = None
    if mask is not None:
        bias = rearrange(mask[:, 1:, None, None], split, t=frames)[..., 0]  # [B, 1, groups, keys]
        bias = F.pad(bias, (1, 0), value=1.0)[..., None, :]
    patches, _ = attend(q_, k_, v_, bias)
    back = "b h n t d -> b (t n) (h d)" if axis == "time" else "b h t n d -> b (t n) (h d)"
    out = torch.cat([rearrange(cls, "b h 1 d -> b 1 (h d)"), rearrange(patches, back)], dim=1)
    return linear(p, f"{name}.proj", out), logits.mean(dim=1)[:, 0]


def read_text(p: Tensors, name: str, x: Tensor, text: Tensor, text_bias: Tensor) -> Tensor:
    """`x` plus, through a gate, what the video tokens read from the text states [B, L, D]."""
    k, v = rearrange(linear(p, f"{name}.qkv_text_i2t", text), "b l (two h d) -> two b h l d", two=2, d=64)
    q = linear(p, f"{name}.qkv_i2t", norm(p, f"{name}.norm_i2t_i", x, 1e-5))
    out, _ = attend(rearrange(q, "b s (h d) -> b h s d", d=64), k, v, text_bias)
    return x + p[f"{name}.alpha_i2t"] * linear(p, f"{name}.proj_i2t", rearrange(out, "b h s d -> b s (h d)"))


def block(
    p: Tensors,
    name: str,
    x: Tensor,
    frames: int,
    eps: float,
    text: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Space-time block `name`; `text` is states and additive mask. Returns tokens and CLS's logits as `divided`."""
    timed = x + divided(p, f"{name}.timeattn", norm(p, f"{name}.norm3", x, eps), frames, "time")[0]
    spaced, logits = divided(p, f"{name}.attn", norm(p, f"{name}.norm1", timed, eps), frames, "space", mask)
    if text is not None:
        spaced = read_text(p, f"{name}.attn", spaced, *text)
    x = x + spaced
    hidden = F.gelu(linear(p, f"{name}.mlp.fc1", norm(p, f"{name}.norm2", x, eps)))
    return x + linear(p, f"{name}.mlp.fc2", hidden), logits


def encode(
    p: Tensors, frames: Tensor, depth: int, path: Literal["fused", "dual"] = "fused", eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Video tokens [B, S, D] after `depth` blocks, without the final norm, and CLS's logits [B, S] there."""
    x = embed(p, frames, "cls_token" if path == "fused" else "video_model.cls_token")
    logits = x.new_zeros(x.shape[:2])
    for i in range(depth):
        x, logits = block(p, f"video_model.blocks.{i}", x, frames.shape[1], eps)
    return x, logits


def text_layer(p: Tensors, name: str, text: Tensor, bias: Tensor, video: Tensor) -> Tensor:
    """Fused RoBERTa layer `name`: text [B, L, D] also attends to video [B, S, D], through a gate."""

    def attention(kind: str, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (
            rearrange(linear(p, f"{name}.{kind}.self.{part}", y), "b l (h d) -> b h l d", d=64)
            for part, y in (("query", x), ("key", source), ("value", source))
        )
        return linear(p, f"{name}.{kind}.output.dense", rearrange(attend(q, k, v, bias)[0], "b h l d -> b l (h d)"))

    own = attention("attention", text, text, bias)
    own = own + p[f"{name}.alpha_t2i"] * attention("crossattention_t2i", own, video, None)
    x = norm(p, f"{name}.attention.output.LayerNorm", own + text, 1e-5)
    hidden = F.gelu(linear(p, f"{name}.intermediate.dense", x))
    return norm(p, f"{name}.output.LayerNorm", linear(p, f"{name}.output.dense", hidden) + x, 1e-5)


def answer(p: Tensors, x: Tensor, frames: int, text: Tensor, attention_mask: Tensor, start: int) -> Tensor:
    """EgoVLPv2's logits [B, A] from video tokens [B, S, D] and text states [B, L, D] at the first fused block."""
    bias = (1 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
    i = start
    while f"video_model.blocks.{i}.attn.alpha_i2t" in p:
        fused, _ = block(p, f"video_model.blocks.{i}", x, frames, 1e-5, (text, bias))
        text = text_layer(p, f"text_model.encoder.layer.{i}", text, bias, x)
        x, i = fused, i + 1
    return classify(p, x)


def classify(p: Tensors, x: Tensor) -> Tensor:
    """Tokens [B, S, D] to logits [B, A]."""
    return linear(p, "projector_2", F.relu(linear(p, "projector_1", norm(p, "norm", x, 1e-6)[:, 0])))


def halve(x: Tensor, frames: int) -> Tensor:
    """2x2 max-pool of every frame's tokens or mask [B, S, D]; CLS is kept."""
    side = round(((x.shape[1] - 1) // frames) ** 0.5)
    small = reduce(x[:, 1:], "b (t r i c j) d -> b (t r c) d", "max", t=frames, r=side // 2, c=side // 2, i=2, j=2)
    return torch.cat([x[:, :1], small], dim=1)


def double(x: Tensor, frames: int) -> Tensor:
    """Every token of [B, S, D] repeated 2x2; CLS is kept."""
    side = round(((x.shape[1] - 1) // frames) ** 0.5)
    large = repeat(x[:, 1:], "b (t r c) d -> b (t r i c j) d", t=frames, r=side, c=side, i=2, j=2)
    return torch.cat([x[:, :1], large], dim=1)


def mfas_encode(p: Tensors, frames: Tensor, depth: int, growth: Growth) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MFAS's two towers: fine [B, S, D], coarse [B, 1 + T*N/4, D], and CLS's map over each, [B, T, N] and a quarter."""
    t = frames.shape[1]
    fine = embed(p, frames, "cls_token", coarse_positions=True)
    coarse = halve(fine, t)
    maps = [fine.new_zeros(fine.shape[:2]), coarse.new_zeros(coarse.shape[:2])]
    for i in range(depth):
        coarse, maps[1] = block(p, f"video_model.cloned_blocks.{i}", coarse, t, 1e-5)
        fine, maps[0] = block(p, f"video_model.blocks.{i}", fine, t, 1e-5)
        up, down = double(coarse, t), halve(fine, t)
        fine, coarse = fine + p["alpha"] * up, coarse + p["belta"] * down
    cut = slice(0, -1) if growth.shifted else slice(1, None)
    over_fine, over_coarse = (rearrange(m[:, cut], "b (t n) -> b t n", t=t) for m in maps)
    return fine, coarse, over_fine, over_coarse


def mfas_score(over_fine: Tensor, over_coarse: Tensor) -> Tensor:
    """What a frame's patches are ranked by [B, T, N]: both maps, each a softmax over the frame's positions."""
    side = round(over_coarse.shape[2] ** 0.5)
    large = repeat(over_coarse, "b t (r c) -> b t (r i c j)", r=side, i=2, j=2)
    return over_fine.softmax(dim=-1) + large.softmax(dim=-1)


def mfas_select(score: Tensor, growth: Growth) -> Tensor:
    """Kept patches [B, T, N] (1 or 0): the prior region, grown frame by frame by top patches that touch it."""
    b, t, n = score.shape
    side = round(n**0.5)
    region = torch.zeros(b, side, side, dtype=torch.bool)
    margin = max(1, side // 7)
    region[:, 2 * margin :, margin : side - margin] = True
    frames = []
    for i in range(t):
        top = torch.zeros(b, n, dtype=torch.bool).scatter_(1, score[:, i].topk(growth.top, dim=1).indices, True)
        padded = F.pad(region, (1, 1, 1, 1))
        touching = padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1] | padded[:, 1:-1, :-2] | padded[:, 1:-1, 2:]
        region = region | (top.view(b, side, side) & touching)
        frames.append(region.flatten(1))
    return torch.stack(frames, dim=1).to(score.dtype)


def mfas_answer(p: Tensors, x: Tensor, kept: Tensor, text: Tensor, attention_mask: Tensor, start: int) -> Tensor:
    """MFAS's logits [B, A]; `kept` [B, T, N] from `mfas_select`, the rest as in `answer`."""
    t = kept.shape[1]
    bias = (1 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
    mask = F.pad(kept.flatten(1), (1, 0), value=1.0)[..., None]  # [B, S, 1]
    last = max(i for i in range(start, 99) if f"video_model.blocks.{i}.attn.alpha_i2t" in p)
    for i in range(start, last + 1):
        if i == last - 2:
            x, mask = halve(x, t), halve(mask, t)
        if i == last - 1:
            x, mask = (torch.cat([y[:, :1], reduce(y[:, 1:], "b (t n) d -> b t d", "max", t=t)], 1) for y in (x, mask))
        if i == last:
            x, mask = (torch.cat([y[:, :1], y[:, 1:].amax(dim=1, keepdim=True)], 1) for y in (x, mask))
            t = 1
        additive = mask[..., 0].masked_fill(mask[..., 0] == 0, -torch.exp(torch.tensor(12.0)).item())
        fused, _ = block(p, f"video_model.blocks.{i}", x, t, 1e-5, (text, bias), additive)
        text = text_layer(p, f"text_model.encoder.layer.{i}", text, bias, x)
        x = fused
    return classify(p, x)
