"""Checksums are the standard ones, and a replaced file is the old one or the new one."""

import zlib
from pathlib import Path

import numpy as np
import pytest

from egopatch.features.io.files import crc32c, replacing, size_and_crc, size_and_crc_of_file


@pytest.mark.parametrize("size", [0, 1, 9, 2**20 - 1, 2**20, 2**21 + 7])
def test_sums_of_a_file(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert size_and_crc_of_file(tmp_path / "file") == size_and_crc(content) == (size, zlib.crc32(content))


def test_crc32c_of_the_check_string() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


def test_replacing_keeps_the_old_file_if_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as new:
            new.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_two_that_replace_a_file_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
