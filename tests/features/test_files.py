"""The checksums are the standard ones, whichever library takes them."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from egopatch.features.io.files import crc32c, size_and_crc, size_and_crc_of_file


@pytest.mark.parametrize("size", [0, 1, 9, 2**20 - 1, 2**20, 2**21 + 7])
def test_sums_of_a_file(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert size_and_crc_of_file(tmp_path / "file") == size_and_crc(content) == (size, zlib.crc32(content))


def test_crc32c_of_the_check_string() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283
