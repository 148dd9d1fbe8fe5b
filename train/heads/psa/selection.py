"""`select_attend` for one head, or for M stacked heads that share one read of the tokens.

Shape legend: M stacked heads, C clips, B questions, T frames, N patches a frame, D channels, H attention heads.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from egopatch.configs.schema import ConfigError
from egopatch.train.heads.common.question import without_autocast
from egopatch.train.ops.largest import largest_mask
from egopatch.train.ops.select_attend import Implementation, attend_stacked, choose_implementation, select_attend
from egopatch.train.ops.stacked import for_all_heads, on_device

Selected = tuple[Tensor, Tensor, Tensor]


class Patches(NamedTuple):
    """The patches that questions select from, the same for all heads; the fields are arguments of `select_attend`."""

    tokens: Tensor
    clip_index: Tensor
    scale: Tensor | None
    clip_rows: Tensor | None


class PatchSelection(nn.Module):
    """Keeps the best patches of each frame and attends over them, as `select_attend` defines it.

    Attributes:
        ks: Number of patches to keep in a frame, one for each stacked head.
    """

    def __init__(self, k: int, implementation: Implementation) -> None:
        super().__init__()
        self.ks: tuple[int, ...] = (k,)
        self.implementation = implementation

    def forward(self, patches: Patches, queries: Tensor, selector: Tensor, bias: Tensor) -> Selected:
        """pooled [B, T, H, D], lse [B, T, H] and kept [B, T, N] bool; the arguments are `select_attend`'s."""
        if len(self.ks) > 1:
            stacked = partial(self.for_stacked_heads, patches)
            selected: Selected = for_all_heads(stacked, queries, selector, bias)
            return selected
        return self.for_one_head(patches, queries, selector, bias, self.ks[0])

    def for_one_head(self, patches: Patches, queries: Tensor, selector: Tensor, bias: Tensor, k: int) -> Selected:
        """The result of `forward` for a single head that keeps `k` patches."""
        tokens, clip_index, scale, clip_rows = patches
        if choose_implementation(tokens, queries.dtype, self.implementation)[0] == "triton":
            # The kernels return the mask of the kept patches.
            leaves = (queries[None], selector[None], bias[None])
            ks = on_device((k,), torch.int32, tokens.device)
            pooled, lse, mask = attend_stacked(tokens, clip_index, *leaves, ks, scale, clip_rows)
            return pooled.squeeze(0), lse.squeeze(0), mask.squeeze(0)
        out = select_attend(tokens, clip_index, queries, selector, bias, k, scale, self.implementation, clip_rows)
        kept = torch.zeros(*out.kept.shape[:2], tokens.shape[2], dtype=torch.bool, device=tokens.device)
        return out.pooled, out.lse, kept.scatter_(2, out.kept, True)

    def for_stacked_heads(self, patches: Patches, queries: Tensor, selector: Tensor, bias: Tensor) -> Selected:
        """The results of M heads, [M, B, ...], for queries [M, B, H, D], selector [M, B, D] and bias [M, C, T, N].

        One launch of the GPU's kernels computes all heads. A CPU reads the tokens once for all heads, because memory
        bandwidth limits the products of a clip with few questions, but not those with the questions of all heads.
        """
        tokens, clip_index, scale, clip_rows = patches
        if not _reads_once(tokens):
            if choose_implementation(tokens, queries.dtype, self.implementation)[0] == "triton":
                ks = on_device(self.ks, torch.int32, tokens.device)
                return attend_stacked(tokens, clip_index, queries, selector, bias, ks, scale, clip_rows)
            results = [self.for_one_head(patches, queries[m], selector[m], bias[m], k) for m, k in enumerate(self.ks)]
            pooled, lse, kept = (torch.stack(result) for result in zip(*results, strict=True))
            return pooled, lse, kept
        if _grouped_by_clip(clip_index):
            with without_autocast(tokens):  # as the reference
                return _SelectStacked.apply(patches, queries, selector, bias, self.ks)
        order = clip_index.argsort(stable=True)
        grouped = patches._replace(clip_index=clip_index[order])
        back = order.argsort()
        selected = self.for_stacked_heads(grouped, queries[:, order], selector[:, order], bias)
        pooled, lse, kept = (result[:, back] for result in selected)
        return pooled, lse, kept


class _SelectStacked(torch.autograd.Function):
    """Computes all heads' questions about a clip together, with dense products: one clip at a time stays in the cache.

    The questions must be grouped by clip; Q is the number of questions about one. In memory, pooled is ordered by
    stacked head and attention head, which is the order that the value projections need.
    """

    @staticmethod
    def forward(
        ctx: Any, patches: Patches, queries: Tensor, selector: Tensor, bias: Tensor, ks: tuple[int, ...]
    ) -> Selected:
        stacked, questions, heads, width = queries.shape
        _, frames, count, _ = patches.tokens.shape
        groups = _clip_groups(patches)
        scores = queries.new_empty(stacked, questions, frames, count)
        for clip, row, group in groups:
            x = _clip_tokens(patches, row)
            products = rearrange(selector[:, group], "m q d -> (m q) d") @ rearrange(x, "t n d -> d (t n)")
            products = rearrange(products, "(m q) (t n) -> m q t n", m=stacked, t=frames)
            torch.add(products, bias[:, None, clip], out=scores[:, group])
        kept = torch.stack([largest_mask(score, k) for score, k in zip(scores, ks, strict=True)])
        if min(ks) < count:
            scores.masked_fill_(~kept, -torch.inf)
        pooled_mhbtd = queries.new_empty(stacked, heads, questions, frames, width)
        lse_mhbt = queries.new_empty(stacked, heads, questions, frames)
        weights = []
        for _, row, group in groups:
            x = _clip_tokens(patches, row)
            logits = rearrange(queries[:, group], "m q h d -> (m h q) d") @ rearrange(x, "t n d -> d (t n)")
            logits = rearrange(logits, "(m h q) (t n) -> m h q t n", m=stacked, h=heads, t=frames)
            logits.add_(scores[:, None, group])
            top = logits.amax(dim=-1, keepdim=True)
            weight = logits.sub_(top.masked_fill(top == -torch.inf, 0)).exp_()
            total = weight.sum(dim=-1, keepdim=True)
            weight /= total.masked_fill(total == 0, 1)
            lse_mhbt[:, :, group] = (total.log() + top)[..., 0]
            pooled = torch.bmm(rearrange(weight, "m h q t n -> t (m h q) n"), x)
            pooled_mhbtd[:, :, group] = rearrange(pooled, "t (m h q) d -> m h q t d", m=stacked, h=heads)
            weights.append(weight)
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(queries, bias)
        ctx.patches, ctx.groups, ctx.weights = patches, groups, weights
        return rearrange(pooled_mhbtd, "m h b t d -> m b t h d"), rearrange(lse_mhbt, "m h b t -> m b t h"), kept

    @staticmethod
    def backward(ctx: Any, grad_pooled: Tensor, grad_lse: Tensor, _: None) -> tuple[Tensor | None, ...]:
        queries, bias = ctx.saved_tensors
        stacked, _, heads, _ = queries.shape
        grad_queries = torch.zeros_like(queries)
        grad_bias = torch.zeros_like(bias)
        for (clip, row, group), weight in zip(ctx.groups, ctx.weights, strict=True):
            x = _clip_tokens(ctx.patches, row)
            grad = torch.bmm(rearrange(grad_pooled[:, group], "m q t h d -> t (m h q) d"), x.transpose(1, 2))
            grad = rearrange(grad, "t (m h q) n -> m h q t n", m=stacked, h=heads).contiguous()
            grad -= (weight * grad).sum(dim=-1, keepdim=True)
            grad += rearrange(grad_lse[:, group], "m q t h -> m h q t 1")
            grad *= weight
            grad_bias[:, clip] = grad.sum(dim=(1, 2))
            products = rearrange(grad, "m h q t n -> (m h q) (t n)") @ rearrange(x, "t n d -> (t n) d")
            grad_queries[:, group] = rearrange(products, "(m h q) d -> m q h d", m=stacked, h=heads)
        return None, grad_queries, grad_queries.sum(dim=2), grad_bias, None


def implementation_in_use(tokens: Tensor, implementation: Implementation, stacked: int) -> tuple[str, str]:
    """The implementation that selects patches for `stacked` heads on such tokens, and the reason, for a log.

    Raises:
        ConfigError: `implementation` cannot run here.
    """
    if stacked > 1 and tokens.device.type == "cpu":
        return "one read for all runs", f"{stacked} runs, tokens are on cpu"
    try:
        return choose_implementation(tokens, torch.float32, implementation)
    except ValueError as error:
        raise ConfigError(f"head.implementation is {implementation}: {error}") from None


def _clip_groups(patches: Patches) -> list[tuple[int, int, slice]]:
    """Each clip with questions, its row of the tokens, and the range of its questions, which are grouped by clip."""
    clips, counts = patches.clip_index.unique_consecutive(return_counts=True)
    rows = clips if patches.clip_rows is None else patches.clip_rows[clips]
    ends = counts.cumsum(dim=0)
    ranges = map(slice, (ends - counts).tolist(), ends.tolist())
    return list(zip(clips.tolist(), rows.tolist(), ranges, strict=True))


def _reads_once(tokens: Tensor) -> bool:
    """Whether all heads are computed on one reading of the tokens."""
    return tokens.device.type == "cpu"


def _grouped_by_clip(clip_index: Tensor) -> bool:
    """Whether the questions about each clip are consecutive, as in the batches of a question table."""
    return len(clip_index.unique_consecutive()) == len(clip_index.unique())


def _clip_tokens(patches: Patches, row: int) -> Tensor:
    """[T, N, D] in float32."""
    x = patches.tokens[row].float()
    return x if patches.scale is None else x * patches.scale[row, ..., None].float()
