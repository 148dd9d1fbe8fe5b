"""`select_attend` in PyTorch: the specification, and a chunked version of it that is fast on a CPU.

Shape legend: C clips, B questions, T frames, N patches a frame, D channels, H attention heads, k kept patches a frame.
Inside a chunk: c clips with Q questions each (clips with fewer are padded), f frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from egopatch.train.ops.largest import largest_indices

# Bytes of a chunk's tokens in the arithmetic's dtype, and of the kept rows gathered from them. About the size of a
# last-level cache: larger chunks are read from memory twice, smaller ones cost more calls.
CHUNK_BYTES = 8 * 2**20
# Above this fraction of kept patches, one product over all patches is cheaper than gathering the kept ones.
DENSE_SHARE = 0.25


def specification(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None = None,
    clip_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in plain differentiable PyTorch. It copies the clip of every question, so memory grows with B.

    Returns:
        pooled [B, T, H, D], lse [B, T, H] and kept [B, T, k], as `select_attend` defines them.
    """
    dtype = arithmetic_dtype(queries)
    x = tokens.to(dtype)
    if scale is not None:
        x = x * scale.to(dtype)[..., None]
    x_btnd = (x if clip_rows is None else x[clip_rows])[clip_index]
    s_btn = torch.einsum("bd,btnd->btn", selector.to(dtype), x_btnd) + bias.to(dtype)[clip_index]
    # A stable sort leaves equal scores in the order of their patches: the lowest index wins.
    kept = s_btn.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values
    x_btkd = x_btnd.gather(2, kept[..., None].expand(*kept.shape, x.shape[-1]))
    a_bthk = torch.einsum("bhd,btkd->bthk", queries.to(dtype), x_btkd) + s_btn.gather(2, kept)[:, :, None]
    empty = a_bthk.amax(dim=-1, keepdim=True) == -torch.inf
    weights = a_bthk.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
    lse = a_bthk.masked_fill(empty, 0).logsumexp(dim=-1).masked_fill(empty[..., 0], -torch.inf)
    pooled = torch.einsum("bthk,btkd->bthd", weights, x_btkd)
    return pooled.to(queries.dtype), lse, kept


def forward(
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    selector: Tensor,
    bias: Tensor,
    k: int,
    scale: Tensor | None,
    clip_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`specification`'s outputs, and the softmax weights [B, T, H, k] for `backward`.

    Each clip is read once for all its questions, and memory beyond the outputs stays near `CHUNK_BYTES`.

    Raises:
        ValueError: `clip_index` or `clip_rows` is out of range.
    """
    _, frames, _, width = tokens.shape
    questions, heads, _ = queries.shape
    dtype = arithmetic_dtype(queries)
    pooled = queries.new_empty(questions, frames, heads, width)
    lse = queries.new_empty(questions, frames, heads, dtype=dtype)
    weights = queries.new_empty(questions, frames, heads, k, dtype=dtype)
    kept = clip_index.new_empty(questions, frames, k, dtype=torch.int64)
    for chunk in _chunks(tokens, clip_index, len(bias), clip_rows, k, dtype):
        x = chunk.tokens(tokens, dtype)
        s_cqfn = chunk.scores(x, selector[chunk.slots].to(dtype), bias, scale)
        kept_cqfk = largest_indices(s_cqfn, k)
        q_cqhd = queries[chunk.slots].to(dtype)
        rows = _products_with(x, kept_cqfk)
        a = rows.logits(q_cqhd)
        factor = chunk.factor(scale, kept_cqfk, dtype)
        if factor is not None:
            a *= factor
        a += s_cqfn.gather(3, kept_cqfk)[:, :, :, None]
        top = a.amax(dim=-1, keepdim=True)
        p = a.sub_(top.masked_fill(top == -torch.inf, 0)).exp_()
        total = p.sum(dim=-1, keepdim=True)
        p /= total.masked_fill(total == 0, 1)
        chunk.store(lse, (total.log() + top)[..., 0])
        chunk.store(weights, p)
        chunk.store(kept, kept_cqfk)
        chunk.store(pooled, rows.combine(p if factor is None else p * factor))
    return pooled, lse, kept, weights


def backward(
    grad_pooled: Tensor,
    grad_lse: Tensor,
    tokens: Tensor,
    clip_index: Tensor,
    queries: Tensor,
    bias: Tensor,
    kept: Tensor,
    weights: Tensor,
    scale: Tensor | None,
    clip_rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [B, H, D], selector [B, D] and bias [C, T, N], in `weights`' dtype.

    The score s enters every head's logit with factor 1, so the selector's gradient is that of the queries, summed
    over heads, and the bias's is that of the logits, summed over heads and questions.
    """
    patches = tokens.shape[2]
    k, dtype = kept.shape[-1], weights.dtype
    grad_queries = torch.zeros_like(queries, dtype=dtype, memory_format=torch.contiguous_format)
    grad_bias = weights.new_zeros(bias.shape)
    for chunk in _chunks(tokens, clip_index, len(bias), clip_rows, k, dtype):
        x = chunk.tokens(tokens, dtype)
        kept_cqfk = chunk.load(kept)
        rows = _products_with(x, kept_cqfk)
        p = chunk.load(weights)
        factor = chunk.factor(scale, kept_cqfk, dtype)
        grad = rows.products(chunk.load(grad_pooled).to(dtype))
        if factor is not None:
            grad *= factor
        # In this order a single kept patch, whose weight is 1, gets exactly grad_lse.
        grad -= (p * grad).sum(dim=-1, keepdim=True)
        grad += chunk.load(grad_lse).to(dtype)[..., None]
        grad *= p
        if chunk.padded:
            grad *= chunk.filled[:, :, None, None, None]
        grad_scores = grad.new_zeros(*kept_cqfk.shape[:3], patches).scatter_(3, kept_cqfk, grad.sum(dim=3)).sum(dim=1)
        grad_bias[chunk.clips, chunk.frames] = grad_scores
        chunk.add(grad_queries, rows.pull(grad if factor is None else grad * factor))
    return grad_queries, grad_queries.sum(dim=1), grad_bias


def arithmetic_dtype(queries: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 for float64 queries, otherwise float32."""
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Chunk:
    """c clips, the questions that read them and a range of frames.

    Attributes:
        clips: [c].
        rows: [c], row of the tokens of each clip.
        slots: [c, Q], question of each slot; padding slots contain question 0.
        filled: [c, Q] bool, false on the padding.
        padded: Whether there is padding.
        frames: Range of frames.
    """

    clips: Tensor
    rows: Tensor
    slots: Tensor
    filled: Tensor
    padded: bool
    frames: slice

    def tokens(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """[c, f, N, D] in `dtype`."""
        if len(self.rows) == 1:
            return tokens[self.rows[0], self.frames].to(dtype).contiguous()[None]
        x = torch.empty(len(self.rows), *tokens[0, self.frames].shape, dtype=dtype, device=tokens.device)
        for target, row in zip(x, self.rows.tolist(), strict=True):
            target.copy_(tokens[row, self.frames])
        return x

    def scores(self, x: Tensor, selector: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
        """s [c, Q, f, N]."""
        c, f, n, d = x.shape
        scores = torch.bmm(selector, x.view(c, f * n, d).transpose(1, 2)).view(c, -1, f, n)
        if scale is not None:
            scores *= scale[self.rows, self.frames].to(x.dtype)[:, None]
        scores += bias[self.clips, self.frames].to(x.dtype)[:, None]
        return scores

    def factor(self, scale: Tensor | None, kept: Tensor, dtype: torch.dtype) -> Tensor | None:
        """[c, Q, f, 1, k], the scale of the kept patches."""
        if scale is None:
            return None
        scale_cqfn = scale[self.rows, self.frames].to(dtype)[:, None].expand(-1, kept.shape[1], -1, -1)
        return scale_cqfn.gather(3, kept)[:, :, :, None]

    def load(self, tensor: Tensor) -> Tensor:
        """[c, Q, f, ...] of a [B, T, ...] tensor."""
        return tensor[self.slots, self.frames]

    def store(self, tensor: Tensor, values: Tensor) -> None:
        """Write [c, Q, f, ...] into a [B, T, ...] tensor, without the padding."""
        tensor[self._real(self.slots), self.frames] = self._real(values).to(tensor.dtype)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add [c, Q, ...] to a [B, ...] tensor, without the padding. No question is in a chunk twice."""
        tensor[self._real(self.slots)] += self._real(values)

    def _real(self, values: Tensor) -> Tensor:
        """[c, Q, ...] to the questions without the padding, [b, ...]; a view if there is no padding."""
        return values[self.filled] if self.padded else values.flatten(0, 1)


class _KeptRows:
    """Products with the gathered kept rows, for few kept patches."""

    def __init__(self, x: Tensor, kept: Tensor) -> None:
        c, f, n, d = x.shape
        frame = torch.arange(c * f, device=x.device).view(c, 1, f, 1) * n
        self._shape = kept.shape
        self._rows = x.view(-1, d).index_select(0, (kept + frame).view(-1))

    def logits(self, queries: Tensor) -> Tensor:
        """Products of queries [c, Q, H, D] with the rows: [c, Q, f, H, k]."""
        c, q, f, k = self._shape
        rows = self._rows.view(c * q, f * k, -1)
        return torch.bmm(queries.flatten(0, 1), rows.transpose(1, 2)).view(c, q, -1, f, k).transpose(2, 3).contiguous()

    def combine(self, weights: Tensor) -> Tensor:
        """Sum of the rows weighted by [c, Q, f, H, k]: [c, Q, f, H, D]."""
        c, q, f, k = self._shape
        return torch.bmm(weights.flatten(0, 2), self._rows.view(c * q * f, k, -1)).unflatten(0, (c, q, f))

    def products(self, values: Tensor) -> Tensor:
        """Products of values [c, Q, f, H, D] with the rows: [c, Q, f, H, k]."""
        c, q, f, k = self._shape
        return torch.bmm(values.flatten(0, 2), self._rows.view(c * q * f, k, -1).transpose(1, 2)).unflatten(
            0, (c, q, f)
        )

    def pull(self, grad: Tensor) -> Tensor:
        """Sum of the rows weighted by [c, Q, f, H, k], also over frames: [c, Q, H, D]."""
        c, q, f, k = self._shape
        flat = grad.transpose(2, 3).reshape(c * q, -1, f * k)
        return torch.bmm(flat, self._rows.view(c * q, f * k, -1)).unflatten(0, (c, q))


class _AllRows:
    """The products of `_KeptRows` over all rows, with weight 0 on the dropped ones, for many kept patches."""

    def __init__(self, x: Tensor, kept: Tensor) -> None:
        self._x = x
        self._kept = kept

    def _pick(self, dense: Tensor) -> Tensor:
        index = self._kept[:, :, :, None].expand(*dense.shape[:-1], -1)
        return dense.gather(4, index)

    def _spread(self, kept: Tensor) -> Tensor:
        dense = kept.new_zeros(*kept.shape[:-1], self._x.shape[2])
        return dense.scatter_(4, self._kept[:, :, :, None].expand_as(kept), kept)

    def logits(self, queries: Tensor) -> Tensor:
        """As in `_KeptRows`."""
        c, f, n, d = self._x.shape
        q, h = queries.shape[1:3]
        dense = torch.bmm(queries.view(c, q * h, d), self._x.view(c, f * n, d).transpose(1, 2))
        return self._pick(dense.view(c, q, h, f, n).transpose(2, 3))

    def combine(self, weights: Tensor) -> Tensor:
        """As in `_KeptRows`."""
        c, f, n, d = self._x.shape
        q, h = weights.shape[1], weights.shape[3]
        dense = self._spread(weights).transpose(1, 2).reshape(c * f, q * h, n)
        return torch.bmm(dense, self._x.view(c * f, n, d)).view(c, f, q, h, d).transpose(1, 2)

    def products(self, values: Tensor) -> Tensor:
        """As in `_KeptRows`."""
        c, f, n, d = self._x.shape
        q, h = values.shape[1], values.shape[3]
        flat = values.transpose(1, 2).reshape(c * f, q * h, d)
        dense = torch.bmm(flat, self._x.view(c * f, n, d).transpose(1, 2))
        return self._pick(dense.view(c, f, q, h, n).transpose(1, 2))

    def pull(self, grad: Tensor) -> Tensor:
        """As in `_KeptRows`."""
        c, f, n, d = self._x.shape
        q, h = grad.shape[1], grad.shape[3]
        flat = self._spread(grad).transpose(2, 3).reshape(c, q * h, f * n)
        return torch.bmm(flat, self._x.view(c, f * n, d)).view(c, q, h, d)


def _gathers(k: int, patches: int) -> bool:
    """Whether the k kept rows of a frame are gathered, rather than multiplied with all others."""
    return k <= DENSE_SHARE * patches


def _products_with(x: Tensor, kept: Tensor) -> _KeptRows | _AllRows:
    """The cheaper way to multiply by those of the tokens [c, f, N, D] that `kept` [c, Q, f, k] names."""
    return _KeptRows(x, kept) if _gathers(kept.shape[-1], x.shape[2]) else _AllRows(x, kept)


def _chunks(
    tokens: Tensor, clip_index: Tensor, clips: int, clip_rows: Tensor | None, k: int, dtype: torch.dtype
) -> Iterator[_Chunk]:
    """Cut the work so that a chunk's tokens and its gathered rows each stay near `CHUNK_BYTES`."""
    _, frames, patches, width = tokens.shape
    if len(clip_index) == 0 or frames == 0:
        return
    _check_below(clip_index, clips, "clip_index")
    if clip_rows is not None:
        _check_below(clip_rows, len(tokens), "clip_rows")
    counts = torch.bincount(clip_index, minlength=clips)
    order = torch.argsort(clip_index, stable=True)
    first = counts.cumsum(0) - counts
    # Clips are sorted by their number of questions, so that there is little padding.
    busiest = torch.argsort(counts, descending=True, stable=True)
    busiest = busiest[: int((counts > 0).sum())]
    sizes = counts[busiest].tolist()
    frame_bytes = patches * width * dtype.itemsize
    row_bytes = k * width * dtype.itemsize if _gathers(k, patches) else 0
    start = 0
    while start < len(sizes):
        most = sizes[start]
        per_clip = frames * max(frame_bytes, most * row_bytes)
        stop = start + max(1, CHUNK_BYTES // per_clip)
        # A clip with fewer than half as many questions as the chunk's first clip starts the next chunk.
        stop = next((i for i in range(start, min(stop, len(sizes))) if sizes[i] * 2 < most), min(stop, len(sizes)))
        chosen = busiest[start:stop]
        rows = chosen if clip_rows is None else clip_rows[chosen]
        place = torch.arange(most, device=clip_index.device)
        filled = place < counts[chosen, None]
        slots = torch.where(filled, order[(first[chosen, None] + place).clamp_max(len(order) - 1)], 0)
        step = max(1, CHUNK_BYTES * frames // per_clip)
        for frame in range(0, frames, step):
            yield _Chunk(chosen, rows, slots, filled, sizes[stop - 1] < most, slice(frame, min(frame + step, frames)))
        start = stop


def _check_below(index: Tensor, end: int, name: str) -> None:
    lowest, highest = int(index.min()), int(index.max())
    if lowest < 0 or highest >= end:
        raise ValueError(f"{name} holds {lowest if lowest < 0 else highest}; expected 0 to {end - 1}")
