"""`verify` finds every fault and names the clips; `repair` and encoding again restore the store."""

import errno
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from egopatch.features import DamagedStore, Failure, Store, StoreError, StoreSpec, create_store, open_store
from egopatch.features.__main__ import main
from egopatch.features.formats.registry import format_named
from egopatch.features.state.ledger import raw_ledger_journal
from egopatch.features.state.quarantine import raw_quarantine_journal
from egopatch.features.storage.folder import LocalStorage
from egopatch.features.storage.interface import Storage
from egopatch.features.tools.audit import Audit, audit_store
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import check_shards, verify
from egopatch.features.values.location import Location
from egopatch.features.values.spec import Codec
from tests.features.conftest import FINGERPRINT, FORMATS, IDS, SPEC, clip, fill
from tests.features.faults import FAULTS, apply, damage_row, faulty_files

TEXTS = ("what is on the table?", "did it move?", "why?")
TEXT_SPEC = StoreSpec.for_text(length=5, width=8, shard=2)


def clips_and_texts(root: Location, format: str, codec: Codec = "none") -> Store:
    """A store of clips, with its text states, all committed; one clip was in quarantine before."""
    store = create_store(root, replace(SPEC, codec=codec), FINGERPRINT, IDS, format)
    store.write_shard(0, {}, {}, {IDS[1]: Failure("broken", "Traceback")})
    fill(store)
    store.write_shard(0, {IDS[1]: clip(1)}, {IDS[1]: "sha256:1"})
    fill(create_store(root / "text", replace(TEXT_SPEC, codec=codec), FINGERPRINT, TEXTS, format))
    return store


@pytest.fixture(scope="module", params=FORMATS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "store"
    clips_and_texts(root, request.param)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` that a test may spoil."""
    return shutil.copytree(whole, tmp_path / "store")


@pytest.fixture(scope="module", params=[("zarr", "zstd"), ("zarr", "blosc-zstd"), ("hdf5", "gzip")])
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compressed") / "store"
    clips_and_texts(root, *request.param)
    return root


def test_an_intact_store_has_no_faults(whole: Path) -> None:
    report = verify(whole)
    assert report.ok
    assert (report.clips, report.texts, report.shards) == (10, 3, 5)
    assert report.nbytes > 0


def holds_data(path: Path) -> bool:
    return (path.suffix == ".h5" and path.name != "index.h5") or path.name.startswith("c.")


@pytest.mark.parametrize("seed", [*range(70), *(pytest.param(n, marks=pytest.mark.slow) for n in range(70, 210))])
def test_every_random_fault_is_found(whole: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    check_that_a_fault_is_found(whole, seed, capsys)


@pytest.mark.parametrize("seed", range(30))
def test_every_random_fault_in_a_compressed_store_is_found(
    compressed: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    check_that_a_fault_is_found(compressed, seed, capsys)


def damage(whole: Path, seed: int) -> tuple[Path, bytes, str]:
    """One fault; returns the file, what it held, and what was done to it.

    Half of the faults are in the data, half in what describes them: metadata, ledger, ids, quarantine, heads.
    """
    chance = random.Random(seed)
    path = chance.choice([path for path in faulty_files(whole) if holds_data(path) == (seed % 2 == 0)])
    fault = chance.choice(["flip", "flip", *FAULTS])
    if fault == "extend" and path.suffix == ".jsonl":
        fault = "flip"  # bytes after the last line are what a crash leaves, and are no fault
    return path, apply(path, fault, chance), fault


def check_that_a_fault_is_found(whole: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    path, before, fault = damage(whole, seed)
    try:
        code = main(["verify", str(whole), "--json"])
    finally:
        path.write_bytes(before)
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (code, report["ok"], printed.err) == (1, False, ""), f"{fault} in {path}"
    if holds_data(path):
        shard_ids = {IDS[:4], IDS[4:8], IDS[8:], TEXTS[:2], TEXTS[2:]}
        assert any(set(report["bad_clips"]) <= set(ids) for ids in shard_ids)
        assert report["bad_clips"]


@pytest.mark.parametrize("seed", range(12))
def test_repair_and_encoding_again_restore_everything(whole: Path, root: Path, seed: int) -> None:
    chance = random.Random(1000 + seed)
    files = faulty_files(root)
    apply(files[seed * len(files) // 12], chance.choice(list(FAULTS)), chance)
    check_that_repair_restores(whole, root)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(210))
def test_repair_and_re_encoding_undo_every_random_fault(whole: Path, root: Path, seed: int) -> None:
    damage(root, seed)
    check_that_repair_restores(whole, root)


def check_that_repair_restores(whole: Path, root: Path) -> None:
    """After the clips dropped by `repair` have been encoded again, the store is as it was."""
    expected = open_store(whole).read(IDS)
    expected_text = open_store(whole / "text").read_text(TEXTS)
    repair(root)
    assert verify(root).ok
    for half, spec, ids in ((root, SPEC, IDS), (root / "text", TEXT_SPEC, TEXTS)):
        store = create_store(half, spec, FINGERPRINT, ids, open_store(half).format)
        for work in store.missing_shards():
            rows = {name: clip(ids.index(name), spec) for name in work.ids}
            store.write_shard(work.shard, rows, dict.fromkeys(rows, "sha256:again"))
    assert verify(root).ok
    for name, tensor in open_store(root).read(IDS).tensors().items():
        assert torch.equal(tensor, expected.tensors()[name]), name
    assert torch.equal(open_store(root / "text").read_text(TEXTS).states, expected_text.states)


def test_a_changed_copy_of_the_header_is_rewritten(root: Path) -> None:
    path = next(path for path in (root / "zarr.json", root / "index.h5") if path.exists())
    path.write_bytes(path.read_bytes().replace(b"sha256:1", b"sha256:2"))
    assert [fault.where for fault in verify(root).faults] == [path.name]
    repair(root)
    assert verify(root).ok
    assert open_store(root, expect=FINGERPRINT).clip_ids == IDS


def test_only_the_bad_clip_is_encoded_again(root: Path) -> None:
    damage_row(open_store(root), IDS[5])
    assert verify(root).bad_clips == (IDS[5],)
    assert repair(root).dropped == (IDS[5],)
    assert open_store(root).missing() == (IDS[5],)
    with pytest.raises(KeyError):
        open_store(root).read([IDS[5]])
    fill(open_store(root))
    assert verify(root).ok


def test_damage_is_reported_with_a_command_that_quotes_the_path(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = root.rename(root.with_name("my store"))
    lines = (root / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (root / "ledger.jsonl").write_bytes(b"".join([lines[0], lines[1].replace(b"P", b"Q", 1), *lines[2:]]))
    command = f"run `egopatch features repair '{root}'`"
    with pytest.raises(DamagedStore, match=f"ledger.jsonl line 2 is damaged; {re.escape(command)}"):
        open_store(root)
    assert main(["verify", str(root)]) == 1
    assert command in capsys.readouterr().out
    (root / "store.json").write_bytes(b"{")
    with pytest.raises(DamagedStore, match=re.escape(command)):
        open_store(root)


def test_verify_info_and_repair_commands_report_damage(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(root)]) == 0
    assert re.search(r"10 clips and 3 texts in 5 shards, .*\nevery committed clip reads", capsys.readouterr().out)
    assert main(["info", str(root), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["committed"], info["planned"], info["text"]["kind"]) == (10, 10, "text")
    assert info["fingerprint"]["depth"] == 6
    assert main(["info", str(root)]) == 0
    assert "patches: float16 [2, 6, 8]" in capsys.readouterr().out
    (root / "store.json").write_bytes(b"{")
    assert main(["info", str(root)]) == 1
    assert "store.json is damaged; run `egopatch features repair" in capsys.readouterr().err
    assert main(["verify", str(root), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"][0]["where"] == "store.json"
    assert main(["repair", str(root)]) == 0
    assert main(["verify", str(root)]) == 0
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "which does not exist; expected the folder of a store" in capsys.readouterr().err
    assert main(["verfy", str(root)]) == 2
    assert "did you mean verify?" in capsys.readouterr().err


def test_verify_names_a_bad_text_as_one_and_each_file_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "text" / "ledger.jsonl").write_bytes(b"")
    (root / "ledger.jsonl.head").unlink()
    assert main(["verify", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "\n  ledger.jsonl.head is missing or damaged\n" in printed
    assert "\n  text/ledger.jsonl ends after 0 of " in printed
    assert "\n  bad text 'why?'\n" in printed
    assert "2 faults, 0 bad clips, 3 bad texts: run" in printed
    assert main(["repair", str(root)]) == 0
    assert "removed 'why?'\nrun `egopatch extract run` to encode again what was removed\n" in capsys.readouterr().out


def test_clips_that_an_interrupted_repair_removed_are_missing_and_repair_says_so(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Storage, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    damage_row(open_store(root), IDS[1])
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "staging", full)
        assert main(["repair", str(root)]) == 1
    assert "no space left while rewriting shard 0" in capsys.readouterr().err
    assert main(["repair", str(root)]) == 0
    assert capsys.readouterr().out == "nothing was removed; run `egopatch extract run` to encode what is missing\n"
    assert open_store(root).missing() == (IDS[1],)  # and not in quarantine, where it was before it was committed


def test_an_unfinished_text_store_is_left_to_extract_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "text")
    (root / "text").mkdir()
    assert main(["verify", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "\n  text is unfinished: no store at " in printed
    assert printed.endswith("\n1 fault, 0 bad clips: run `egopatch extract run`\n")
    assert main(["info", str(root), "--json"]) == 0
    captured = capsys.readouterr()
    assert "text" not in json.loads(captured.out)
    assert captured.err.startswith("note: text is unfinished: no store at ")
    (root / "ledger.jsonl.head").unlink()  # a fault that `repair` mends before it names what `extract run` has to do
    assert main(["verify", str(root)]) == 1
    assert "2 faults, 0 bad clips: run `egopatch features repair" in capsys.readouterr().out
    assert main(["repair", str(root)]) == 1
    assert re.search(r"no store at \S+text \(store.json is missing\); run `extract run`", capsys.readouterr().err)
    assert [fault.where for fault in verify(root).faults] == ["text"]


def test_texts_that_cannot_be_reached_are_not_called_unfinished(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def audit(storage: Storage) -> Audit:
        if storage.location.name == "text":
            raise StoreError("no answer")
        return audit_store(storage)

    monkeypatch.setattr("egopatch.features.tools.verify.audit_store", audit)
    with pytest.raises(StoreError, match="no answer"):
        verify(root)


def test_a_damaged_text_is_called_a_text_when_it_is_read(root: Path) -> None:
    texts = open_store(root / "text")
    row = texts.read_text(["why?"]).states.numpy().tobytes()
    path = next(path for path in faulty_files(texts.path) if row in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(row, bytes(len(row))))
    with pytest.raises(DamagedStore, match=r"^text 'why\?'"):
        open_store(texts.path).read_text(["why?"])


def test_progress_covers_clips_and_texts(whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(whole, on_bytes=lambda *figures: calls.append(figures))
    assert [total for _, total in calls] == [report.nbytes] * report.shards
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1][0] == report.nbytes
    main(["verify", str(whole)])
    assert capsys.readouterr().err == ""  # a file gets no bar
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["verify", str(whole), "--json"])
    assert capsys.readouterr().err == ""
    main(["verify", str(whole)])
    assert "verify" in capsys.readouterr().err


def test_repair_json_lists_faults_and_dropped_clips(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(path for path in faulty_files(root) if holds_data(path) and "text" not in path.parts)
    path.write_bytes(b"")
    assert main(["repair", str(root), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["dropped"] == list(IDS[:4])
    assert done["before"]["ok"] is False
    assert done["before"]["faults"][0]["where"] == str(path.relative_to(root))


def test_ids_lost_after_dropping_all_clips_can_be_added_again(tmp_path: Path, format: str) -> None:
    root = tmp_path / "store"
    store = create_store(root, SPEC, FINGERPRINT, IDS[:2], format)
    fill(store)
    store.rewrite_shard(0, without=IDS[:2])
    (root / "ids.jsonl").write_bytes(b"")
    repair(root)
    assert verify(root).ok
    fill(create_store(root, SPEC, FINGERPRINT, IDS[:2], format))
    assert open_store(root).clip_ids == IDS[:2]
    assert verify(root).ok


def test_ids_after_a_damaged_line_keep_their_committed_rows(tmp_path: Path, format: str) -> None:
    """Without the damaged line, each id would get two rows: its committed one and an earlier one."""
    root = tmp_path / "store"
    create_store(root, SPEC, FINGERPRINT, IDS[:2], format)
    store = create_store(root, SPEC, FINGERPRINT, IDS, format)
    committed = IDS[4:8]
    store.write_shard(1, {name: clip(1) for name in committed}, dict.fromkeys(committed, "x"))
    lines = (root / "ids.jsonl").read_bytes().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if b'"kind":"grow"' in line)
    lines[first] = lines[first].replace(IDS[0].encode(), IDS[0].encode()[::-1])
    (root / "ids.jsonl").write_bytes(b"".join(lines))
    report = repair(root).before
    assert not report.ok
    planned = open_store(root).planned_ids
    assert len(planned) == len(set(planned))
    fill(create_store(root, SPEC, FINGERPRINT, IDS, format))
    store = open_store(root)
    assert sorted(store.clip_ids) == sorted(IDS)
    assert torch.equal(store.read(committed).patches, torch.stack([clip(1)["patches"].half()] * 4))
    assert verify(root).ok


def test_a_shard_rewritten_with_fewer_clips_has_no_fault(tmp_path: Path, format: str) -> None:
    root = tmp_path / "store"
    store = create_store(root, SPEC, FINGERPRINT, IDS[:3], format)
    fill(store)
    store.rewrite_shard(0, without=IDS[:3])
    store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "x"})
    assert open_store(root).clip_ids == IDS[:1]
    assert verify(root).ok


def test_repair_removes_leftovers_of_dead_writers(root: Path) -> None:
    (root / "staging" / f"{1:08d}-0123").mkdir()
    assert verify(root).ok
    repair(root)
    assert list((root / "staging").iterdir()) == []
    assert open_store(root).clip_ids == IDS
    assert verify(root).ok


def test_repair_of_an_intact_store_writes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be on a read-only file system, where nothing is lost either."""
    open_file = os.open

    def read_only(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open_file(path, flags, mode)

    monkeypatch.setattr(os, "open", read_only)
    assert main(["repair", str(root)]) == 0
    assert capsys.readouterr().out == "no clip was lost\n"
    damage_row(open_store(root), IDS[0])
    assert main(["repair", str(root)]) == 1
    assert "growth.lock: Read-only file system; mount its file system for writing" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [0, 1])
def test_a_shard_whose_clips_are_dropped_during_verify_has_no_fault(store: Store, kept: int) -> None:
    audit = audit_store(LocalStorage(store.path))
    for shard in (0, 1):
        store.rewrite_shard(shard, without=store.catalog.ids_of(shard)[kept:])
    assert [faults for _, faults in check_shards(audit)] == [[], [], []]


def test_a_shard_committed_during_verify_has_no_fault(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    store = create_store(root, SPEC, FINGERPRINT, IDS[:4], format)
    fill(store, skip=IDS[3:])
    audit, faults = audit_store(LocalStorage(root)), []
    real = LocalStorage.publish

    def publish(self: LocalStorage, *args: Any) -> str:
        write_id = real(self, *args)
        faults.extend(faults_of for _, faults_of in check_shards(audit))
        return write_id

    monkeypatch.setattr(LocalStorage, "publish", publish)
    fill(store)
    assert faults == [[]]


def test_repair_keeps_a_failure_added_by_a_concurrent_writer(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    store.write_shard(0, {}, {}, {IDS[0]: Failure("once")})
    store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "hash"})
    journal = raw_quarantine_journal(store.catalog.storage)
    read, failures = journal.read, iter([{IDS[5]: Failure("late")}])

    def then_write(*args: Any) -> Any:
        found = read(*args)
        for late in failures:
            store.write_shard(1, {}, {}, late)
        return found

    monkeypatch.setattr(journal, "read", then_write)
    monkeypatch.setattr("egopatch.features.tools.repair.raw_quarantine_journal", lambda storage: journal)
    assert repair(store.path, changed=[IDS[0]]).dropped == (IDS[0],)
    assert set(open_store(store.path).quarantine) == {IDS[5]}


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "give this user"), (errno.EMFILE, "raise the"), (errno.ESTALE, "check the")]
)
def test_a_file_that_cannot_be_opened_is_not_reported_as_damaged(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    shard, open_file = format_named(store.format).file_names(SPEC, 1)[0], os.open

    def refuse(path: Any, *args: Any) -> int:
        if str(path).endswith(shard):
            raise OSError(number, os.strerror(number), str(path))
        return open_file(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        for action in (verify, repair, lambda path: store.read(IDS)):
            with pytest.raises(StoreError, match=rf"{shard} cannot be opened \(.*\); {remedy} .*, and run") as caught:
                action(store.path)
            assert type(caught.value) is StoreError
    assert open_store(store.path).clip_ids == IDS


def test_verifying_a_damaged_ledger_makes_no_request_per_clip(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make()
    fill(store, skip=IDS[4:])
    storage, looked = store.catalog.storage, []
    ledger = raw_ledger_journal(storage)
    ledger.rewrite(lambda _: [])
    ledger.append({"kind": "unknown", "shard": 0})

    def counting(self: object, real: Callable[..., Any], *args: Any) -> Any:
        looked.append((real, *args))
        return real(self, *args)

    for name in ("exists", "write_ids", "write_ids_by_shard"):
        monkeypatch.setattr(type(storage), name, partialmethod(counting, getattr(type(storage), name)))
    assert verify(store.path).bad_clips == IDS[:4]
    assert len(looked) == len(set(looked))
