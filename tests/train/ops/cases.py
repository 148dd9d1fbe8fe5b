"""Inputs, a float64 oracle in plain loops and error bounds for the tests of `select_attend`.

Shape legend: C clips, B questions, T frames, N patches a frame, D channels, H attention heads, k kept patches a frame.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Arguments of `select_attend` except k and the implementation."""

    tokens: Tensor
    clip_index: Tensor
    queries: Tensor
    selector: Tensor
    bias: Tensor
    scale: Tensor | None

    def leaves(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Fresh queries, selector and bias that require gradients."""
        return [t.detach().to(dtype).requires_grad_() for t in (self.queries, self.selector, self.bias)]


def make_case(
    clips: int,
    questions: int,
    frames: int,
    patches: int,
    width: int,
    heads: int,
    dtype: torch.dtype = torch.float32,
    scaled: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """Random arguments whose logits are of order one. Clips repeat and some may be absent."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(clips, frames, patches, width, generator=gen)
    scale = 0.5 + torch.rand(clips, frames, patches, generator=gen) if scaled else None
    if dtype == torch.int8:
        step = 30 if scaled else 2
        x = (x * step).round().clamp(-127, 127)
        scale = None if scale is None else scale / step
    soft = 1 / math.sqrt(width)
    case = Case(
        x.to(dtype),
        torch.randint(0, clips, (questions,), generator=gen),
        torch.randn(questions, heads, width, generator=gen) * soft,
        torch.randn(questions, width, generator=gen) * soft,
        torch.randn(clips, frames, patches, generator=gen),
        scale,
    )
    return Case(*(None if t is None else t.to(device) for t in vars(case).values()))


def gradients(pooled: Tensor, lse: Tensor, leaves: list[Tensor], size: float = 1.0) -> list[Tensor]:
    """Gradients of a fixed random weighting of the outputs, times `size`; empty rows count their lse as zero."""
    gen = torch.Generator().manual_seed(1)
    a = torch.randn(pooled.shape, generator=gen).to(pooled)
    b = torch.randn(lse.shape, generator=gen).to(lse)
    loss = (a * pooled).sum() + (b * lse.masked_fill(lse == -torch.inf, 0)).sum()
    return [g / size for g in torch.autograd.grad(loss * size, leaves)]


def oracle(case: Case, k: int, kept: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """[pooled, lse] in float64 and kept, patch by patch. `kept` replaces the selection, to compare beyond a near tie.

    Differentiable in the case's queries, selector and bias, if those are float64 leaves.
    """
    x = case.tokens.double()
    if case.scale is not None:
        x = x * case.scale.double()[..., None]
    frames, patches = x.shape[1:3]
    pooled_b, lse_b, kept_b = [], [], []
    for b, c in enumerate(case.clip_index.tolist()):
        for t in range(frames):
            score = x[c, t] @ case.selector[b].double() + case.bias[c, t].double()
            value = score.detach().tolist()
            if kept is None:
                order = sorted(range(patches), key=lambda n: (-value[n], n))
                chosen = sorted(order[:k])
            else:
                chosen = kept[b, t].tolist()
            live = [n for n in chosen if value[n] != -math.inf]
            kept_b.append(chosen)
            for query in case.queries[b].double():
                if not live:
                    pooled_b.append(x.new_zeros(x.shape[3]) + 0 * query)
                    lse_b.append(x.new_tensor(-math.inf))
                    continue
                logit = torch.stack([query @ x[c, t, n] + score[n] for n in live])
                weight = logit.softmax(0)
                pooled_b.append(sum(w * x[c, t, n] for w, n in zip(weight, live, strict=True)))
                lse_b.append(logit.logsumexp(0))
    questions, heads = case.queries.shape[:2]
    shape = (questions, frames, heads)
    outputs = [torch.stack(pooled_b).view(*shape, -1), torch.stack(lse_b).view(shape)]
    return outputs, torch.tensor(kept_b).view(questions, frames, k)


def error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference; entries that are equal, infinities among them, count as none."""
    actual, exact = actual.detach(), exact.detach()
    difference = actual.double() - exact.double()
    return float(torch.where(actual.double() == exact.double(), 0.0, difference).square().mean().sqrt())


def assert_as_exact_as(actual: Tensor, eager: Tensor, exact: Tensor, name: str, times: int = 1) -> None:
    """Fail unless `actual`'s error is at most twice that of `eager` and one rounding of its values.

    `times` is how much coarser `actual`'s products are rounded than those of `eager`.

    The rounding allows for results that the eager form happens to compute exactly.
    """
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} against {tuple(exact.shape)}"
    assert not actual.isnan().any(), f"{name} holds NaN"
    size = torch.where(exact.isfinite(), exact.detach().double(), 0.0).square().mean().sqrt()
    bound = 2 * times * error(eager, exact) + torch.finfo(actual.dtype).eps * float(size)
    assert error(actual, exact) <= bound, f"{name}: error {error(actual, exact):.3e}, bound {bound:.3e}"


def low_precision(case: Case, leaves: list[Tensor], kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[pooled, lse] of a given selection with every tensor and every step in `dtype`: the eager yardstick."""
    queries, selector, bias = (leaf.to(dtype) for leaf in leaves)
    x = case.tokens.to(dtype)
    if case.scale is not None:
        x = x * case.scale.to(dtype)[..., None]
    x_btkd = x[case.clip_index].gather(2, kept[..., None].expand(*kept.shape, x.shape[-1]))
    s_btk = torch.einsum("bd,btkd->btk", selector, x_btkd) + bias[case.clip_index].gather(2, kept)
    a_bthk = torch.einsum("bhd,btkd->bthk", queries, x_btkd) + s_btk[:, :, None]
    empty = a_bthk.amax(dim=-1, keepdim=True) == -torch.inf
    a_bthk = a_bthk.masked_fill(empty, 0)
    pooled = torch.einsum("bthk,btkd->bthd", a_bthk.softmax(dim=-1).masked_fill(empty, 0), x_btkd)
    return pooled, a_bthk.logsumexp(dim=-1).masked_fill(empty[..., 0], -torch.inf)


def assert_same_selection(kept: Tensor, case: Case, k: int) -> None:
    """Fail unless `kept` is the exact selection, or differs only between scores that float32 cannot tell apart."""
    x = case.tokens.double()
    if case.scale is not None:
        x = x * case.scale.double()[..., None]
    x_btnd = x[case.clip_index]
    bias = case.bias.double()[case.clip_index]
    scores = torch.einsum("bd,btnd->btn", case.selector.double(), x_btnd) + bias
    exact = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(dim=-1).values
    assert kept.shape == exact.shape
    assert ((kept >= 0) & (kept < scores.shape[-1])).all()
    assert (kept.diff(dim=-1) > 0).all(), "kept is not in rising order"
    # Rounding of a sum of D products, each a float32 multiply and add.
    size = torch.einsum("bd,btnd->btn", case.selector.double().abs(), x_btnd.abs()) + bias.abs()
    slack = torch.finfo(torch.float32).eps * x.shape[-1] ** 0.5 * size.amax(dim=-1, keepdim=True)
    ranked = scores.gather(2, kept).sort(dim=-1).values
    best = scores.gather(2, exact).sort(dim=-1).values
    near = (ranked == best) | ((ranked - best).abs() <= slack)
    assert near.all(), "a patch was kept instead of one with a larger score"
    tied = (scores.diff(dim=-1) == 0).all()
    assert not tied or torch.equal(kept, exact), "equal scores did not go to the lowest patch"
