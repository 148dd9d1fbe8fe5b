"""Random numbers by counter: Philox4x64-10 as published, equal for a part and the whole, uniform and independent."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from egopatch.train.ops.philox import Draw, dropout, uniform
from egopatch.train.ops.philox.library import dropout_kernel, uniform_kernel
from egopatch.train.ops.philox.reference import dropout_factor
from tests.train.ops.test_triton import without_triton

CPU = torch.device("cpu")
ONES = 2**64 - 1
# Counter, key and result of Philox4x64-10 in the known answers of Random123 1.14 (kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    ((ONES,) * 4, (ONES,) * 2, (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0)),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 as published (Salmon et al. 2011), in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & ONES, (a >> 64) ^ c3 ^ k1, a & ONES
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & ONES, (k1 + 0xBB67AE8584CAA73B) & ONES
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    assert philox(counter, key) == list(expected)


def test_uniform_numbers_come_from_philox_blocks() -> None:
    """Row r's block i has the counter (1 + 2 r + i, first, second, 0) and the key (seed, place)."""
    draw = Draw((7, ONES), 5, torch.tensor([-1, 2**40]))
    found = (uniform((3, 11), draw, CPU) * 2**24).long()
    for head, seed in enumerate(draw.seeds):
        for row in range(3):
            words = [w for i in (0, 1) for w in philox((1 + 2 * row + i, ONES, 2**40, 0), (seed, 5))]
            numbers = [half >> 8 for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
            assert found[head, row].tolist() == numbers[:11]


def test_dropout_takes_sixteen_numbers_from_each_philox_block() -> None:
    factor = dropout_factor((2, 18), Draw((7,), 5, torch.tensor([3, 4])), 0.25)
    assert set(factor.flatten().tolist()) == {0.0, float(torch.tensor(4 / 3))}
    for row in range(2):
        words = [w for i in (0, 1) for w in philox((1 + 2 * row + i, 3, 4, 0), (7, 5))]
        numbers = [word >> 16 * part & 0xFFFF for word in words for part in range(4)]
        assert (factor[row] > 0).tolist() == [number >= 2**14 for number in numbers[:18]]


def test_rows_of_a_rank_match_those_of_the_whole_batch() -> None:
    rows = torch.tensor([1, 2, 5, 9])
    whole, part = Draw((3, 4, 3), 1, torch.tensor([2, 0])), Draw((3, 4, 3), 1, torch.tensor([2, 0]), rows)
    assert torch.equal(uniform((4, 3, 5), part, CPU), uniform((10, 3, 5), whole, CPU)[:, rows])
    assert torch.equal(dropout_factor((4, 3, 5), part, 0.5), dropout_factor((10, 3, 5), whole, 0.5)[:, rows])
    assert uniform((0, 3), Draw(rows=torch.empty(0, dtype=torch.long)), CPU).shape == (0, 3)


@pytest.mark.parametrize(
    "other",
    [
        Draw((1,), 2, torch.tensor([3, 4])),
        Draw((0,), 1, torch.tensor([3, 4])),
        Draw((0,), 2, torch.tensor([2, 4])),
        Draw((0,), 2, torch.tensor([3, 5])),
    ],
)
def test_every_field_of_a_draw_changes_all_numbers(other: Draw) -> None:
    one, two = (uniform((50, 1000), draw, CPU).flatten() for draw in (Draw((0,), 2, torch.tensor([3, 4])), other))
    assert float((one == two).float().mean()) < 1e-3
    # The correlation of n independent pairs has a standard deviation of 1 / sqrt(n).
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 4 / len(one) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_requested_share_and_keeps_the_mean(p: float) -> None:
    x = torch.ones(1000, 1000)
    out = dropout(x, Draw((5,)), p)
    spread = (p * (1 - p) / out.numel()) ** 0.5
    assert abs(float((out == 0).double().mean()) - p) < 4 * spread
    assert abs(float(out.double().mean()) - 1) < 4 * spread / (1 - p)
    # Neighbours along a row and down a column are uncorrelated.
    dropped = (out == 0).double() - p
    for one, other in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1])):
        assert abs(float((one * other).mean()) / (p * (1 - p))) < 4e-3


def test_uniform_numbers_are_uniform() -> None:
    drawn = uniform((100, 10_000), Draw((5,)), CPU).flatten().double()
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    counts = np.histogram(drawn.numpy(), 100, (0, 1))[0]
    # Chi-square of 99 degrees of freedom: 148 is exceeded once in a thousand times.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 148


def test_the_dropout_gradient_uses_the_same_mask() -> None:
    x = torch.randn(2, 6, 9, dtype=torch.float64, requires_grad=True)
    draw = Draw((0, 1))
    assert torch.autograd.gradcheck(lambda x: dropout(x, draw, 0.4), x)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_operators_infer_shapes_of_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert dropout_kernel(torch.empty(2, 3, 4).mT, [0, 1], 0, torch.zeros(2), None, 0.5).is_contiguous()
        assert uniform_kernel([3, 4], [0, 1], 0, torch.zeros(2), None, CPU).shape == (2, 3, 4)


@pytest.mark.slow
def test_dropout_on_a_cpu_needs_no_triton() -> None:
    value = "dropout(torch.ones(2, 4), Draw((1,)), 0.5).shape"
    assert without_triton("from egopatch.train.ops.philox import Draw, dropout", value) == "torch.Size([2, 4])"
