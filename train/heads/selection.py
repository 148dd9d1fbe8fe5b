"""`select_attend` for one head, or for a stack of heads on one reading of the tokens.

Shape legend: M members of a stack, C clips, B questions, T frames, N patches a frame, D channels, H attention heads.
"""

from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import ConfigError
from train.ops.select_attend import Implementation, choose_implementation, select_attend

Selected = tuple[Tensor, Tensor, Tensor]


class Selection(nn.Module):
    """Keep the best patches of each frame and attend over them, as `select_attend` defines it.

    Attributes:
        ks: patches to keep in a frame, one for each member of the stack that the head is run in.
    """

    def __init__(self, k: int, implementation: Implementation) -> None:
        super().__init__()
        self.ks: tuple[int, ...] = (k,)
        self.implementation = implementation

    def forward(
        self,
        tokens: Tensor,
        clip_index: Tensor,
        queries: Tensor,
        selector: Tensor,
        bias: Tensor,
        scale: Tensor | None,
    ) -> Selected:
        """pooled [B, T, H, D], lse [B, T, H] and kept [B, T, N] bool; the arguments are `select_attend`'s."""
        if len(self.ks) > 1:
            return _SelectEach.apply(tokens, clip_index, queries, selector, bias, scale, self)
        return self.one(tokens, clip_index, queries, selector, bias, scale, self.ks[0])

    def one(
        self,
        tokens: Tensor,
        clip_index: Tensor,
        queries: Tensor,
        selector: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        k: int,
    ) -> Selected:
        """The same of a single member."""
        out = select_attend(tokens, clip_index, queries, selector, bias, k, scale, self.implementation)
        kept = torch.zeros(*out.kept.shape[:2], tokens.shape[2], dtype=torch.bool, device=tokens.device)
        return out.pooled, out.lse, kept.scatter_(2, out.kept, True)

    def each(
        self,
        tokens: Tensor,
        clip_index: Tensor,
        queries: Tensor,
        selector: Tensor,
        bias: Tensor,
        scale: Tensor | None,
    ) -> Selected:
        """The same of every member: queries [M, B, H, D], selector [M, B, D], bias [M, C, T, N]; results [M, B, ...].

        A kernel reads the tokens once for each member. On a CPU they are read once for all of them: the products of
        few questions with a clip are slower than their arithmetic, those of all members' questions together are not.
        """
        if tokens.device.type != "cpu":
            parts = [
                self.one(tokens, clip_index, queries[m], selector[m], bias[m], scale, k) for m, k in enumerate(self.ks)
            ]
            pooled, lse, kept = (torch.stack(part) for part in zip(*parts, strict=True))
            return pooled, lse, kept
        return _Together.apply(tokens, clip_index, queries, selector, bias, scale, self.ks)


class _SelectEach(torch.autograd.Function):
    """Hands a `vmap` over members to `Selection.each`; it is never run outside of one."""

    generate_vmap_rule = False

    @staticmethod
    def forward(*_: Any) -> Selected:
        raise AssertionError("a selection with several ks runs under vmap alone")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Selected) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Selected, tuple[int, int, int]]:
        tokens, clip_index, queries, selector, bias, scale, selection = inputs
        members = [
            tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            for tensor, dim in zip((queries, selector, bias), in_dims[2:5], strict=True)
        ]
        return selection.each(tokens, clip_index, *members, scale), (0, 0, 0)


class _Together(torch.autograd.Function):
    """All members' questions about a clip at once, densely, clip after clip so that a clip stays in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        clip_index: Tensor,
        queries: Tensor,
        selector: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        ks: tuple[int, ...],
    ) -> Selected:
        members, questions, heads, width = queries.shape
        _, frames, patches, _ = tokens.shape
        groups = _groups(clip_index, len(tokens))
        scores = queries.new_empty(members, questions, frames, patches)
        for clip, rows in groups:
            x = _clip(tokens, scale, clip)
            flat = selector[:, rows].flatten(0, 1) @ x.flatten(0, 1).T
            scores[:, rows] = flat.view(members, len(rows), frames, patches) + bias[:, None, clip]
        kept = torch.stack([keep_largest(score, k) for score, k in zip(scores, ks, strict=True)])
        scores.masked_fill_(~kept, -torch.inf)
        pooled = queries.new_empty(members, questions, frames, heads, width)
        lse = queries.new_empty(members, questions, frames, heads)
        weights = []
        for clip, rows in groups:
            x = _clip(tokens, scale, clip)
            logits = queries[:, rows].flatten(0, 2) @ x.flatten(0, 1).T
            logits = logits.view(members, len(rows), heads, frames, patches).add_(scores[:, rows, None])
            top = logits.amax(dim=-1, keepdim=True)
            weight = logits.sub_(top.masked_fill(top == -torch.inf, 0)).exp_()
            total = weight.sum(dim=-1, keepdim=True)
            weight /= total.masked_fill(total == 0, 1)
            lse[:, rows] = (total.log() + top)[..., 0].transpose(2, 3)
            by_frame = weight.flatten(0, 2).transpose(0, 1)  # [T, members * questions * heads, N]
            out = torch.bmm(by_frame, x).view(frames, members, len(rows), heads, width)
            pooled[:, rows] = out.permute(1, 2, 0, 3, 4)
            weights.append(weight)
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(tokens, clip_index, queries, bias, *([] if scale is None else [scale]))
        ctx.weights = weights
        return pooled, lse, kept

    @staticmethod
    def backward(ctx: Any, grad_pooled: Tensor, grad_lse: Tensor, _: None) -> tuple[Tensor | None, ...]:
        tokens, clip_index, queries, bias, *scales = ctx.saved_tensors
        scale = scales[0] if scales else None
        members, _, heads, width = queries.shape
        _, frames, patches, _ = tokens.shape
        grad_queries = torch.zeros_like(queries)
        grad_bias = torch.zeros_like(bias)
        for (clip, rows), weight in zip(_groups(clip_index, len(tokens)), ctx.weights, strict=True):
            x = _clip(tokens, scale, clip)
            of_pooled = grad_pooled[:, rows].permute(2, 0, 1, 3, 4).reshape(frames, -1, width)
            grad = torch.bmm(of_pooled, x.transpose(1, 2)).transpose(0, 1).contiguous().view(weight.shape)
            grad -= (weight * grad).sum(dim=-1, keepdim=True)
            grad += grad_lse[:, rows].transpose(2, 3)[..., None]
            grad *= weight
            grad_bias[:, clip] = grad.sum(dim=(1, 2))
            pulled = grad.view(-1, frames * patches) @ x.flatten(0, 1)
            grad_queries[:, rows] = pulled.view(members, len(rows), heads, width)
        return None, None, grad_queries, grad_queries.sum(dim=2), grad_bias, None, None


def choose(tokens: Tensor, implementation: Implementation, members: int) -> tuple[str, str]:
    """What runs the selections of a stack on such tokens, and why, for a log.

    Raises:
        ConfigError: `implementation` is one that cannot run here.
    """
    if members > 1 and tokens.device.type == "cpu":
        return "one reading for all members", f"{members} members, tokens are on cpu"
    try:
        return choose_implementation(tokens, torch.float32, implementation)
    except ValueError as error:
        raise ConfigError(f"head.implementation is {implementation}: {error}") from None


def keep_largest(scores: Tensor, k: int) -> Tensor:
    """Mask of the k largest along the last dimension; equal scores go to the lowest index."""
    if k >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    least = scores.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    kept = scores >= least
    if bool((kept.sum(dim=-1) > k).any()):
        # Of those that equal the least, the first few that there is still room for.
        above, equal = scores > least, scores == least
        kept = above | (equal & (equal.cumsum(dim=-1) <= k - above.sum(dim=-1, keepdim=True)))
    return kept


def _groups(clip_index: Tensor, clips: int) -> list[tuple[int, Tensor]]:
    """The clips that are asked about, each with its questions."""
    order = clip_index.argsort(stable=True)
    parts = order.split(torch.bincount(clip_index, minlength=clips).tolist())
    return [(clip, rows) for clip, rows in enumerate(parts) if len(rows)]


def _clip(tokens: Tensor, scale: Tensor | None, clip: int) -> Tensor:
    x = tokens[clip].float()
    return x if scale is None else x * scale[clip, ..., None].float()
