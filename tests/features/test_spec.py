"""Rules that the store and its readers share."""

import pytest

from egopatch.features.values.spec import middle_indices


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(4, 4, [0, 1, 2, 3]), (8, 4, [1, 3, 5, 7]), (16, 4, [2, 6, 10, 14]), (5, 2, [1, 3]), (7, 1, [3]), (3, 0, [])],
)
def test_middle_indices_are_the_middles_of_equal_spans(count: int, wanted: int, expected: list[int]) -> None:
    assert middle_indices(count, wanted) == expected


def test_each_middle_index_lies_in_its_own_span() -> None:
    for count in range(1, 40):
        for wanted in range(1, count + 1):
            for span, index in enumerate(middle_indices(count, wanted)):
                assert span * count <= index * wanted + wanted / 2 <= (span + 1) * count
