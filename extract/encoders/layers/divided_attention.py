"""Divided attention on a GPU, read in place: a patch attends to CLS and to its frame, or to its position in all frames.

PyTorch's own attention would need keys and values copied into one tensor per group, each with CLS in front; on an H100
these copies and their rearrangement took as long as all matrix products together.

Shape legend: B clips, T frames, N patches a frame, S = 1 + T*N tokens (CLS first, then frame by frame), D channels,
H heads of 64, G groups of L tokens: T frames of N patches, or N positions of T frames.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_WIDTH = 64
# Query rows per program.
ROWS = 64


@triton.jit
def attention_kernel(
    qkv, out, S, G, stride_group, stride_token, SCALE: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Attention of BM queries, from P groups of one head and clip, to the L tokens of their own group and to CLS."""
    clip = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first = tl.program_id(1) * P
    i = tl.program_id(2) * BM + tl.arange(0, BM)
    j = tl.arange(0, BN)
    own = first + i // L
    asked = (i < P * L) & (own < G)
    row_i = 1 + own * stride_group + i % L * stride_token
    is_cls = j == P * L
    other = first + j // L
    row_j = tl.where(is_cls, 0, 1 + other * stride_group + j % L * stride_token)
    there = is_cls | ((j < P * L) & (other < G))

    e = tl.arange(0, E)
    clip_qkv = qkv + clip.to(tl.int64) * S * 3 * D + head * E
    q = tl.load(clip_qkv + (row_i * 3 * D)[:, None] + e[None, :], mask=asked[:, None], other=0.0)
    k = tl.load(clip_qkv + D + (row_j * 3 * D)[None, :] + e[:, None], mask=there[None, :], other=0.0)
    logits = tl.dot(q, k) * SCALE
    related = there[None, :] & (is_cls[None, :] | (own[:, None] == other[None, :]))
    logits = tl.where(related, logits, float("-inf"))
    p = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(p, axis=1)
    v = tl.load(clip_qkv + 2 * D + (row_j * 3 * D)[:, None] + e[None, :], mask=there[:, None], other=0.0)
    o = tl.dot(p.to(v.dtype), v) * (1.0 / total)[:, None]
    target = out + clip.to(tl.int64) * S * D + head * E
    tl.store(target + (row_i * D)[:, None] + e[None, :], o.to(out.dtype.element_ty), mask=asked[:, None])


def divided_attention(qkv: Tensor, frames: int, axis: Literal["time", "space"]) -> Tensor:
    """Attention of the patches; the rows of CLS are left empty.

    Args:
        qkv: [B, S, 3*D], contiguous, float16 or bfloat16.
        frames: T.
        axis: `time`: a patch attends to its position in every frame; `space`: to the patches of its frame.

    Returns:
        [B, S, D].
    """
    clips, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    patches, heads = (tokens - 1) // frames, width // HEAD_WIDTH
    groups, length, stride_group, stride_token = (
        (frames, patches, patches, 1) if axis == "space" else (patches, frames, 1, patches)
    )
    together = max(1, ROWS // length)  # short groups share a program, where others' tokens are masked
    out = torch.empty(clips, tokens, width, dtype=qkv.dtype, device=qkv.device)
    grid = (clips * heads, triton.cdiv(groups, together), triton.cdiv(together * length, ROWS))
    with torch.cuda.device_of(qkv):
        attention_kernel[grid](
            qkv, out, tokens, groups, stride_group, stride_token, SCALE=HEAD_WIDTH**-0.5, D=width, H=heads,
            L=length, P=together, BM=ROWS, BN=max(16, triton.next_power_of_2(together * length + 1)), E=HEAD_WIDTH,
            num_warps=4,
        )  # fmt: skip
    return out
