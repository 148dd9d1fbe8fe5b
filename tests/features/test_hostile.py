"""Files whose checksums are valid but whose contents this program never writes."""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egopatch.features import DamagedStore, Failure, OtherVersion, Store, StoreError, create_store, open_store
from egopatch.features.__main__ import main
from egopatch.features.io.files import crc32c
from egopatch.features.state.header import read_header, write_header
from egopatch.features.state.ledger import raw_ledger_journal
from egopatch.features.storage.folder import LocalStorage
from egopatch.features.storage.journal import FileJournal, decode_line, encode_line
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import verify
from tests.features.conftest import FINGERPRINT, IDS, SPEC, fill


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS)
    fill(store)
    return store


def _four_tebibytes(header: dict) -> None:
    for array in header["spec"]["arrays"]:
        if array["name"] != "cls":
            array["shape"][0] = 2**35


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _four_tebibytes,
            r"ledger.jsonl line 2 committed 4 rows in \d+ bytes, but store.json claims \d{13} bytes a row",
        ),
        (
            lambda h: h["spec"]["arrays"][0].update(name="../../elsewhere"),
            r"array '../../elsewhere' is unknown or repeated; a store of patches can keep cls, patches",
        ),
        (lambda h: h["spec"].update(arrays=7), "does not describe a store"),
        (lambda h: h["spec"].update(shard=0), "shard is 0; expected at least 1 row"),
        (lambda h: h["spec"].update(codec="lzma"), "codec is 'lzma'; expected one of none, zstd"),
        (
            lambda h: h["spec"].update(codec="gzip"),
            "codec is 'gzip'; expected one of zarr's codecs: none, zstd, blosc-zstd",
        ),
        (lambda h: h.pop("version"), "does not describe a store .'version' is missing"),
        (
            lambda h: h["fingerprint"].update(depth=[6]),
            r"does not describe a store \(fingerprint has 'depth' = \[.*; expected text",
        ),
        (lambda h: h.update(format="pickle"), "format 'pickle' is unknown"),
        (
            lambda h: h["fingerprint"].update(checkpoint="sha256:2"),
            "ledger.jsonl line 2 committed clips whose fingerprint differs from the store's",
        ),
        (
            lambda h: h["spec"]["arrays"][0].update(shape=[-1, 2, 8]),
            r"does not describe a store .*expected a tuple of ints",
        ),
    ],
)
def test_malformed_headers_are_refused(
    store: Store, change: Callable[[dict], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    header = read_header(LocalStorage(store.path))
    change(header)
    write_header(LocalStorage(store.path), header)
    with pytest.raises(StoreError, match=message):
        open_store(store.path)
    assert main(["info", str(store.path)]) == 1
    assert main(["verify", str(store.path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


LINES = [
    ("ledger.jsonl", {"row": 1}, "'kind' is missing"),
    ("ledger.jsonl", {"kind": "commit", "shard": 0}, "'ids' is missing"),
    ("ledger.jsonl", {"kind": "merge", "shard": 0}, "'kind' is 'merge'; expected announce, commit or drop"),
    ("ledger.jsonl", {"kind": "drop", "shard": [], "ids": 3}, r"'shard' is \[\]; expected a whole number"),
    ("ledger.jsonl", {"kind": "drop", "shard": 0, "ids": [3]}, "'ids' holds 3; expected a text"),
    ("ledger.jsonl", {"kind": "announce", "shard": 0, "files": {"a": 1}}, "found 1; expected an object with 'bytes'"),
    (
        "ledger.jsonl",
        {"kind": "commit", "shard": 0, "ids": ["a"], "rows": [10**15], "crc32c": {}, "sources": [""]},
        r"'rows' is \[1000000000000000\]; expected 1 rising number from 0 to 99999999",
    ),
    (
        "ledger.jsonl",
        {"kind": "commit", "shard": 0, "ids": ["a", "b"], "rows": [1, 1]},
        r"'rows' is \[1, 1\]; expected 2 rising numbers",
    ),
    ("ledger.jsonl", {"kind": "commit", "shard": 0, "ids": [], "rows": []}, r"'rows' is \[\]; expected 0 rising"),
    (
        "ledger.jsonl",
        {"kind": "commit", "shard": 0, "ids": ["a"], "rows": [0], "crc32c": {"cls": "00"}},
        "'crc32c' is .*; expected eight hexadecimal digits a clip, of 1 clip",
    ),
    (
        "ledger.jsonl",
        {"kind": "commit", "shard": 0, "ids": ["a"], "rows": [0], "crc32c": {}, "sources": []},
        "'sources' has 0 entries; expected 1, one for each clip",
    ),
    ("ids.jsonl", {"row": 1}, "'kind' is missing"),
    ("ids.jsonl", {"kind": "grow", "ids": "ab", "files": {}}, "'ids' is 'ab'; expected a list"),
    ("ids.jsonl", {"kind": "grow", "ids": [], "files": {"x": {"bytes": 1, "crc32": "zz"}}}, "eight hexadecimal digits"),
    ("ids.jsonl", {"kind": "grow", "ids": [], "files": {"x": {"bytes": 1, "crc32": "-0000001"}}}, "eight hexadecimal"),
    ("quarantine.jsonl", {"row": 1}, "'id' is missing"),
    ("quarantine.jsonl", {"id": "a", "reason": 3, "traceback": ""}, "'reason' is 3; expected a text"),
]


@pytest.mark.parametrize(("file", "record", "message"), LINES)
def test_malformed_journal_lines_are_named_and_repaired(
    store: Store, file: str, record: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    FileJournal(store.path / file, dict).append(record)
    number = len((store.path / file).read_bytes().splitlines())
    message = rf"{file} line {number} is intact but does not belong there: .*{message}.*; run `egopatch features repair"
    with pytest.raises(DamagedStore, match=message):
        open_store(store.path).missing()
    report = verify(store.path)
    assert [fault.where for fault in report.faults] == [file]
    assert main(["info", str(store.path)]) == 1
    assert main(["repair", str(store.path)]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert verify(store.path).ok
    assert open_store(store.path).clip_ids == IDS


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _replaced(value: object, chance: random.Random, by: object) -> object:
    """`value` with one of its parts, at any depth, taken out or replaced."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        if chance.random() < 0.2:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: _replaced(value[key], chance, by)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        place = chance.randrange(len(value))
        return [*value[:place], _replaced(value[place], chance, by), *value[place + 1 :]]
    return by


@settings(max_examples=60, deadline=None)
@given(file=st.sampled_from(["ledger.jsonl", "ids.jsonl", "quarantine.jsonl", "store.json"]), part=JSON, data=st.data())
def test_any_change_with_a_valid_checksum_is_harmless_or_a_clear_error(
    full: Store, file: str, part: object, data: st.DataObject
) -> None:
    path = full.path / file
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    place = data.draw(st.integers(0, len(lines) - 1))
    number, record = decode_line(lines[place]) or (0, {})
    changed = _replaced(record, random.Random(data.draw(st.integers())), part)
    try:
        lines[place] = encode_line(number, changed)  # type: ignore[arg-type]
    except UnicodeEncodeError:
        return
    path.write_bytes(b"".join(lines))
    message = ""
    try:
        try:
            store = open_store(full.path)
            store.missing()
            ids = store.clip_ids[:3]
            assert len(store.read(ids).cls) == len(ids)
        except StoreError as error:
            message = str(error)
        assert "\n" not in message
        with suppress(OtherVersion):
            assert not any("\n" in fault.what for fault in verify(full.path).faults)
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = create_store(tmp_path_factory.mktemp("full") / "store", SPEC, FINGERPRINT, IDS)
    store.write_shard(0, {}, {}, {IDS[0]: Failure("broken", "Traceback")})
    fill(store, skip=(IDS[5],))
    store.rewrite_shard(0, without=(IDS[1],))
    return store


def test_a_clip_outside_its_shard_is_refused(store: Store) -> None:
    journal = raw_ledger_journal(LocalStorage(store.path))
    records = [line.entry for line in journal.read().lines]
    records[1]["rows"][-1], records[3]["rows"][0] = 4, 3
    journal.rewrite(lambda _: records)
    with pytest.raises(DamagedStore, match=r"ledger.jsonl line 2 places clip '.*' in row 4, outside of shard 0"):
        open_store(store.path)
    assert not verify(store.path).ok


def test_a_refused_ledger_line_is_refused_on_every_refresh(store: Store) -> None:
    journal = raw_ledger_journal(LocalStorage(store.path))
    commit = journal.read().lines[1].entry
    journal.append({**commit, "fingerprint": "another"})
    for _ in range(2):
        with pytest.raises(DamagedStore, match="committed clips whose fingerprint differs"):
            store.catalog.refresh()


@pytest.mark.parametrize("version", [1, 9])
def test_a_store_of_another_version_is_left_alone(
    store: Store, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    header = read_header(LocalStorage(store.path))
    write_header(LocalStorage(store.path), {**header, "version": version})
    before = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    message = (
        f"store.json has version {version}, but this program reads version 3; use the program that wrote the store"
    )
    for act in (open_store, verify, repair, lambda path: create_store(path, SPEC, FINGERPRINT, ("new",))):
        with pytest.raises(OtherVersion, match=message):
            act(store.path)
    for command in ("info", "verify", "repair", "convert"):
        assert main([command, str(store.path)]) == 1
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()} == before


def test_metadata_claiming_four_tebibytes_is_ignored_and_repaired(tmp_path: Path, format: str) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS, format)
    fill(store)
    if format == "zarr":
        path = store.path / "patches" / "zarr.json"
        metadata = json.loads(path.read_bytes())
        metadata["shape"][0] = 2**38
        path.write_text(json.dumps(metadata))
    else:
        path = store.path / "index.h5"
        with h5py.File(path, "a") as file:
            del file["patches"]
            file.create_dataset("patches", (2**38, 2, 6, 8), "f2", chunks=(1, 2, 6, 8))
    assert len(open_store(store.path).read(IDS).cls) == len(IDS)  # read by what the header and the ledger say
    where = str(path.relative_to(store.path))
    assert [(fault.where, fault.what) for fault in verify(store.path).faults] == [
        (where, "differs from what was written")
    ]
    assert repair(store.path).rewritten == (where,)
    assert verify(store.path).ok


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((10**12, 196), "outside the file"),
        ((0, 2**42), "outside the file"),
        ((2**64 - 1,) * 2, "has no row 0 of its shard"),
    ],
)
def test_bad_shard_index_entries_are_refused(store: Store, entry: tuple[int, int], message: str) -> None:
    path = store.path / "patches" / "c.1.0.0.0"
    content = path.read_bytes()
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2).copy()
    index[0] = entry
    path.write_bytes(content[:-68] + index.tobytes() + crc32c(index).to_bytes(4, "little"))
    with pytest.raises(DamagedStore, match=f"clip .*P4.* cannot be read: .*{message}"):
        open_store(store.path).read([IDS[4]])
    assert verify(store.path).bad_clips == (IDS[4],)


def test_swapped_rows_are_detected(store: Store) -> None:
    path = store.path / "patches" / "c.1.0.0.0"
    content = path.read_bytes()
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2)[[1, 0, 2, 3]]
    path.write_bytes(content[:-68] + index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little"))
    with pytest.raises(DamagedStore, match="differ from those that were committed"):
        open_store(store.path).read([IDS[4]])
    assert verify(store.path).bad_clips == IDS[4:6]
