"""Files whose checksums are right, but which claim what no store of ours does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from features import DamagedStore, Store, StoreError, create_store, open_store
from features.__main__ import main
from features.durable import crc32c
from features.header import read_header, write_header
from features.ledger import ledger_journal
from features.verify import verify
from tests.features.conftest import FINGERPRINT, IDS, SPEC, fill


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS)
    fill(store)
    return store


def _four_tebibytes(header: dict) -> None:
    header["spec"]["arrays"][0]["shape"] = [2**38, 2, 8]


def _a_path(header: dict) -> None:
    header["spec"]["arrays"][0]["name"] = "../../elsewhere"


def _no_arrays(header: dict) -> None:
    header["spec"]["arrays"] = 7


def _no_shard(header: dict) -> None:
    header["spec"]["shard"] = 0


def _another_format(header: dict) -> None:
    header["format"] = "pickle"


def _a_negative_side(header: dict) -> None:
    header["spec"]["arrays"][0]["shape"] = [-1, 2, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_four_tebibytes, r"store.json claims \d{13} bytes a row, but shard 0 has"),
        (_a_path, "names arrays or a shard size that no store has"),
        (_no_arrays, "does not describe a store"),
        (_no_shard, "names arrays or a shard size that no store has"),
        (_another_format, "format 'pickle' is unknown"),
        (_a_negative_side, r"does not describe a store .*expected positive sides"),
    ],
)
def test_headers(
    store: Store, change: Callable[[dict], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    header = read_header(store.path)
    change(header)
    write_header(store.path, header)
    with pytest.raises(StoreError, match=message):
        open_store(store.path)
    assert main(["info", str(store.path)]) == 1
    assert main(["verify", str(store.path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("record", [{}, {"kind": "commit", "shard": 0}, {"kind": "drop", "shard": [], "ids": 3}])
def test_ledger_lines(store: Store, record: dict, capsys: pytest.CaptureFixture[str]) -> None:
    ledger_journal(store.path).append(record)
    with pytest.raises(DamagedStore, match=r"ledger.jsonl line 7 is no ledger's line"):
        open_store(store.path)
    assert main(["verify", str(store.path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("entry", "message"),
    [((10**12, 196), "outside of itself"), ((0, 2**42), "outside of itself"), ((2**64 - 1,) * 2, "holds nothing")],
)
def test_indices(store: Store, entry: tuple[int, int], message: str) -> None:
    path = store.path / "patches" / "c.1.0.0.0"
    content = path.read_bytes()
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2).copy()
    index[0] = entry
    path.write_bytes(content[:-68] + index.tobytes() + crc32c(index).to_bytes(4, "little"))
    with pytest.raises(DamagedStore, match=f"clip .*P4.* cannot be read: .*{message}"):
        open_store(store.path).read([IDS[4]])
    assert verify(store.path).bad_clips == (IDS[4],)


def test_a_row_in_another_ones_place(store: Store) -> None:
    path = store.path / "patches" / "c.1.0.0.0"
    content = path.read_bytes()
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2)[[1, 0, 2, 3]]
    path.write_bytes(content[:-68] + index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little"))
    with pytest.raises(DamagedStore, match="are not those that were committed"):
        open_store(store.path).read([IDS[4]])
    assert verify(store.path).bad_clips == IDS[4:6]
