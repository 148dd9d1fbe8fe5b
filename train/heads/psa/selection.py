"""`select_attend` for one head, or for a stack of heads on one reading of the tokens.

Shape legend: M members of a stack, C clips, B questions, T frames, N patches a frame, D channels, H attention heads.
"""

from typing import Any

import torch
from torch import Tensor, nn

from egopatch.configs.schema import ConfigError
from egopatch.train.ops.select_attend import Implementation, choose_implementation, select_attend

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
        clip_rows: Tensor | None = None,
    ) -> Selected:
        """pooled [B, T, H, D], lse [B, T, H] and kept [B, T, N] bool; the arguments are `select_attend`'s."""
        if len(self.ks) > 1:
            return _SelectEach.apply(tokens, clip_index, queries, selector, bias, scale, clip_rows, self)
        return self.one(tokens, clip_index, queries, selector, bias, scale, clip_rows, self.ks[0])

    def one(
        self,
        tokens: Tensor,
        clip_index: Tensor,
        queries: Tensor,
        selector: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        clip_rows: Tensor | None,
        k: int,
    ) -> Selected:
        """The same of a single member."""
        out = select_attend(tokens, clip_index, queries, selector, bias, k, scale, self.implementation, clip_rows)
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
        clip_rows: Tensor | None,
    ) -> Selected:
        """The same of every member: queries [M, B, H, D], selector [M, B, D], bias [M, C, T, N]; results [M, B, ...].

        A kernel reads the tokens once for each member. On a CPU they are read once for all of them: the products of
        few questions with a clip are slower than their arithmetic, those of all members' questions together are not.
        """
        if tokens.device.type != "cpu":
            parts = [
                self.one(tokens, clip_index, queries[m], selector[m], bias[m], scale, clip_rows, k)
                for m, k in enumerate(self.ks)
            ]
            pooled, lse, kept = (torch.stack(part) for part in zip(*parts, strict=True))
            return pooled, lse, kept
        if _lie_together(clip_index):
            return _Together.apply(tokens, clip_index, queries, selector, bias, scale, clip_rows, self.ks)
        order = clip_index.argsort(stable=True)
        sorted_ = self.each(tokens, clip_index[order], queries[:, order], selector[:, order], bias, scale, clip_rows)
        back = order.argsort()
        pooled, lse, kept = (part[:, back] for part in sorted_)
        return pooled, lse, kept


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
        tokens, clip_index, queries, selector, bias, scale, clip_rows, selection = inputs
        members = [
            tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            for tensor, dim in zip((queries, selector, bias), in_dims[2:5], strict=True)
        ]
        return selection.each(tokens, clip_index, *members, scale, clip_rows), (0, 0, 0)


class _Together(torch.autograd.Function):
    """All members' questions about a clip at once, densely, clip after clip so that a clip stays in the cache.

    The questions about a clip lie together. R = M * H * Q rows are those of its Q questions. pooled lies in memory by
    member and head, as the value projections that follow multiply it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        clip_index: Tensor,
        queries: Tensor,
        selector: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        clip_rows: Tensor | None,
        ks: tuple[int, ...],
    ) -> Selected:
        members, questions, heads, width = queries.shape
        _, frames, patches, _ = tokens.shape
        runs = _runs(clip_index, clip_rows)
        scores = queries.new_empty(members, questions, frames, patches)
        for clip, row, these in runs:
            x = _clip(tokens, scale, row)
            flat = selector[:, these].flatten(0, 1) @ x.flatten(0, 1).T
            torch.add(flat.view(members, -1, frames, patches), bias[:, None, clip], out=scores[:, these])
        kept = torch.stack([keep_largest(score, k) for score, k in zip(scores, ks, strict=True)])
        if min(ks) < patches:
            scores.masked_fill_(~kept, -torch.inf)
        pooled_mhbtd = queries.new_empty(members, heads, questions, frames, width)
        lse_mhbt = queries.new_empty(members, heads, questions, frames)
        by_head = queries.transpose(1, 2)
        weights = []
        for _, row, these in runs:
            x = _clip(tokens, scale, row)
            logits = by_head[:, :, these].reshape(-1, width) @ x.flatten(0, 1).T
            logits = logits.view(members, heads, -1, frames, patches).add_(scores[:, None, these])
            top = logits.amax(dim=-1, keepdim=True)
            weight = logits.sub_(top.masked_fill(top == -torch.inf, 0)).exp_()
            total = weight.sum(dim=-1, keepdim=True)
            weight /= total.masked_fill(total == 0, 1)
            lse_mhbt[:, :, these] = (total.log() + top)[..., 0]
            by_frame = weight.flatten(0, 2).transpose(0, 1)  # [T, R, N]
            out = torch.bmm(by_frame, x).view(frames, members, heads, -1, width)
            pooled_mhbtd[:, :, these] = out.permute(1, 2, 3, 0, 4)
            weights.append(weight)
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(tokens, queries, bias, *([] if scale is None else [scale]))
        ctx.runs, ctx.weights = runs, weights
        return pooled_mhbtd.permute(0, 2, 3, 1, 4), lse_mhbt.permute(0, 2, 3, 1), kept

    @staticmethod
    def backward(ctx: Any, grad_pooled: Tensor, grad_lse: Tensor, _: None) -> tuple[Tensor | None, ...]:
        tokens, queries, bias, *scales = ctx.saved_tensors
        scale = scales[0] if scales else None
        members, _, heads, width = queries.shape
        _, frames, patches, _ = tokens.shape
        grad_queries = torch.zeros_like(queries)
        grad_bias = torch.zeros_like(bias)
        by_frame = grad_pooled.permute(2, 0, 3, 1, 4)  # [T, M, H, B, D]
        of_lse = grad_lse.permute(0, 3, 1, 2)[..., None]
        for (clip, row, these), weight in zip(ctx.runs, ctx.weights, strict=True):
            x = _clip(tokens, scale, row)
            grad = torch.bmm(by_frame[:, :, :, these].reshape(frames, -1, width), x.transpose(1, 2))
            grad = grad.transpose(0, 1).contiguous().view(weight.shape)
            grad -= (weight * grad).sum(dim=-1, keepdim=True)
            grad += of_lse[:, :, these]
            grad *= weight
            grad_bias[:, clip] = grad.sum(dim=(1, 2))
            pulled = grad.view(-1, frames * patches) @ x.flatten(0, 1)
            grad_queries[:, these] = pulled.view(members, heads, -1, width).transpose(1, 2)
        return None, None, grad_queries, grad_queries.sum(dim=2), grad_bias, None, None, None


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


def _runs(clip_index: Tensor, clip_rows: Tensor | None) -> list[tuple[int, int, slice]]:
    """Each clip that is asked about, its row of the tokens, and its questions, which lie together."""
    clips, counts = clip_index.unique_consecutive(return_counts=True)
    rows = clips if clip_rows is None else clip_rows[clips]
    ends = counts.cumsum(dim=0)
    places = map(slice, (ends - counts).tolist(), ends.tolist())
    return list(zip(clips.tolist(), rows.tolist(), places, strict=True))


def _lie_together(clip_index: Tensor) -> bool:
    """Whether the questions about each clip stand one behind the other, as in the batches of a table."""
    return len(clip_index.unique_consecutive()) == len(clip_index.unique())


def _clip(tokens: Tensor, scale: Tensor | None, row: int) -> Tensor:
    x = tokens[row].float()
    return x if scale is None else x * scale[row, ..., None].float()
