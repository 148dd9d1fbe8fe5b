"""Kernel launches and host synchronisations of a training step, counted on a CPU."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from egopatch.train.heads.psa import selection
from egopatch.train.heads.psa.coarse import kernel_width
from egopatch.train.ops import philox, select_attend
from egopatch.train.ops.select_attend import plan
from egopatch.train.ops.select_attend.plan import tile_bound
from tests.train.test_psa import CONFIG, make_batch
from tests.train.test_stacked_heads import TRAIN, make

aten = torch.ops.aten
# Operators whose results have a size that depends on values, or that return a number.
READS_BACK = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive}


class Launches(TorchDispatchMode):
    """Counts operators that launch something on a GPU: all but views and allocations. A custom one counts once."""

    FREE = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        if not (function.is_view or name in self.FREE or name.startswith("_record_function")):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


class NoKernels:
    """Stands for the module of the kernels: results of the right shapes."""

    @staticmethod
    def forward(
        tokens: Tensor, _: Tensor, queries: Tensor, __: Tensor, bias: Tensor, ks: Tensor, listed: int, *rest: Any
    ) -> tuple[Tensor, ...]:
        (frames, patches), (questions, heads, width), (*_, stacked, dtype) = tokens.shape[1:3], queries.shape, rest
        lse = torch.zeros(stacked, heads, questions // stacked, frames)
        pooled = torch.zeros(*lse.shape, width, dtype=dtype)
        mask = torch.zeros(questions, frames, patches, dtype=torch.int8)
        integers = [(questions, frames, listed), (questions,), (tile_bound(questions, len(bias)), 4), (len(bias) + 1,)]
        kept, *schedule = (torch.zeros(shape, dtype=torch.int32) for shape in integers)
        return pooled, lse, kept.long(), mask, *schedule

    @staticmethod
    def backward(
        grad_pooled: Tensor, grad_lse: Tensor, tokens: Tensor, queries: Tensor, selector: Tensor, bias: Tensor, *_: Any
    ) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(leaf.shape) for leaf in (queries, selector, bias))


class NoNoise:
    """Stands for the module of the kernels of dropout."""

    @staticmethod
    def dropout(x: Tensor, *_: object) -> Tensor:
        return torch.zeros(x.shape, dtype=x.dtype)


def launches_of_a_step(ratios: tuple[float, ...], seeds: tuple[int, ...], dtype: str = "auto") -> Counter[str]:
    """Operators of one step of psa as on a GPU, by name."""
    train = dataclasses.replace(TRAIN, dtype=dtype)
    stack, batch = make(ratios, seeds, train, implementation="triton"), make_batch()
    stack.learn(batch)
    with Launches() as launches:
        stack.learn(batch)
    return launches.counts


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step runs the operators that it runs on a GPU; the custom ones do nothing."""
    monkeypatch.setattr(select_attend, "kernels", NoKernels, raising=False)
    monkeypatch.setattr(plan, "_obstacle", lambda *_: None)
    monkeypatch.setattr(selection, "_reads_once", lambda _: False)
    monkeypatch.setattr(philox, "kernels", NoNoise, raising=False)
    monkeypatch.setattr(philox.api, "_by_kernel", lambda _: True)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("dtype", "of_one", "of_many"), [("float32", 255, 362), ("bfloat16", 268, 373)])
def test_a_step_of_24_heads_launches_at_most_twice_what_one_does(dtype: str, of_one: int, of_many: int) -> None:
    """On a GPU a small head's step is bound by its launches; `docs/kernels.md` says what they are. With torch 2.13."""
    one = launches_of_a_step((0.5,), (0,), dtype)
    ratios = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0)
    many = launches_of_a_step(ratios * 3, (0,) * 8 + (1,) * 8 + (2,) * 8, dtype)
    assert one["select_attend_triton"] == many["select_attend_triton"] == 2
    assert one["dropout"] == many["dropout"] == 12
    # Other versions of torch may split an operator or two.
    assert one.total() <= of_one + 6, one
    assert many.total() <= of_many + 6, many
    assert many.total() <= 2 * one.total(), many - one


class LargeResults(TorchDispatchMode):
    """Names of the operators that write a tensor of at least `numbers` numbers."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.names = numbers, set[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple) else (results,):
            if isinstance(result, Tensor) and result.numel() >= self.numbers and not function.is_view:
                self.names.add(function.name().split("::")[1].split(".")[0])
        return results


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("ratios", [(0.5,), (0.25, 0.5)])
def test_pooled_patches_are_neither_copied_nor_converted(ratios: tuple[float, ...]) -> None:
    """It is by far the largest tensor of a step; at the coarse level it includes padding channels."""
    stack = make(ratios, (0,) * len(ratios), dataclasses.replace(TRAIN, dtype="bfloat16"), implementation="triton")
    batch = make_batch(questions=401)
    clips, frames, _, width = batch.tokens.patches.shape
    batch = dataclasses.replace(batch, derived=torch.zeros(clips, frames, 12, kernel_width(width)).half())
    with LargeResults(len(ratios) * len(batch) * frames * CONFIG.heads * width) as large:
        stack.learn(batch)
    assert large.names == {"select_attend_triton", "bmm"}


def attend_without_kernels(
    tokens: Tensor, clip_index: Tensor, queries: Tensor, selector: Tensor, bias: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Stand-in for the kernels in which the host waits for nothing: each head [M, ...] attends over all patches."""
    x = tokens[clip_index].float()
    scores = torch.einsum("btnd,mbd->mbtn", x, selector) + bias[:, clip_index]
    logits = torch.einsum("btnd,mbhd->mbthn", x, queries) + scores[:, :, :, None]
    pooled = torch.einsum("mbthn,btnd->mbthd", logits.softmax(dim=-1), x)
    return pooled, logits.logsumexp(dim=-1), torch.ones(*pooled.shape[:3], tokens.shape[2], dtype=torch.bool)


@pytest.mark.parametrize("frames", [None, 1])
@pytest.mark.parametrize("ratios", [(0.5,), (0.25, 0.5)])
def test_a_step_reads_nothing_back(
    ratios: tuple[float, ...], frames: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operators that return a number, or a size that depends on values, make the host wait; our kernels do not.

    So does creating a tensor from numbers on the host, unless it is created once.
    """
    stack, batch = make(ratios, (0,) * len(ratios), implementation="triton", frames=frames), make_batch()
    monkeypatch.setattr(selection, "attend_stacked", attend_without_kernels)
    monkeypatch.setattr(selection, "choose_implementation", lambda *_: ("triton", "as requested"))
    monkeypatch.setattr(selection, "_reads_once", lambda _: False)
    monkeypatch.setattr(philox, "kernels", NoNoise, raising=False)
    monkeypatch.setattr(philox.api, "_by_kernel", lambda _: True)
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket in READS_BACK:
                waits.append(str(function))
            return function(*args, **(kwargs or {}))

    def read(name: str) -> Callable[..., Any]:
        real = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            waits.append(name)
            return real(self, *args, **kwargs)

        return counted

    stack.learn(batch)  # makes what is made once
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, read(name))
    for name in ("tensor", "as_tensor"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: waits.append(made.__name__) or made(*a, **k))
    with Watch():
        step = stack.learn(batch)
    assert waits == []
    assert step is not None
    float(step.values[0, 0])
    assert waits == ["__float__"]
