"""What a store records about its rows: the video file and time span of each, and the machines that computed them."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from egopatch.features import DamagedStore, Failure, create_store, open_store
from egopatch.features.__main__ import main
from egopatch.features.state.counts import read_ledger
from egopatch.features.state.ledger import raw_ledger_journal
from egopatch.features.state.origin import Origin
from egopatch.features.storage.pick import storage_at
from egopatch.features.tools.convert import convert
from egopatch.features.tools.derive import derive
from egopatch.features.tools.repair import repair
from egopatch.features.tools.sources import check_sources
from tests.features.conftest import FINGERPRINT, SPEC, clip
from tests.features.test_refresh import FIRST, MOVED, OLD, ORIGINS, Make, check, filled, refresh, work_on


def test_convert_derive_and_rewrites_keep_row_origins(make: Make, tmp_path: Path) -> None:
    store = filled(make)
    copy = convert(store.path, tmp_path / "copy", shard=3)
    assert copy.origins() == ORIGINS
    derived = derive(store.path, tmp_path / "derived", 0.5)
    assert derived.origins() == ORIGINS
    store.rewrite_shard(0, without=[FIRST[2]])
    assert open_store(store.path).origins() == {n: o for n, o in ORIGINS.items() if n != FIRST[2]}


def test_a_repaired_ledger_keeps_row_origins(make_local: Make) -> None:
    store = filled(make_local)
    with (Path(store.path) / "ledger.jsonl").open("a") as file:
        file.write("damaged\n")
    assert "ledger.jsonl" in repair(store.path).rewritten
    assert open_store(store.path).origins() == ORIGINS


def test_a_second_convert_copies_refreshed_rows(make_local: Make, tmp_path: Path) -> None:
    store = filled(make_local)
    convert(store.path, tmp_path / "copy", shard=3)
    refresh(store)
    work = work_on(open_store(store.path), FIRST[1])
    store.write_shard(0, {}, {}, {FIRST[1]: Failure("truncated")}, {}, work.replaces)
    convert(store.path, tmp_path / "copy", shard=3)
    check(tmp_path / "copy", {name: n for name, n in (OLD | {FIRST[0]: 90}).items() if name != FIRST[1]})
    assert open_store(tmp_path / "copy").origins()[FIRST[0]] == MOVED


def test_a_store_of_the_previous_version_opens_and_grows(make: Make) -> None:
    store = make(FIRST)
    store.write_shard(0, {FIRST[1]: clip(1)}, {FIRST[1]: "hash"})
    lines = raw_ledger_journal(storage_at(store.path)).read().lines
    assert not any("origins" in line.entry for line in lines)  # as written by the version before
    store.write_shard(0, {FIRST[0]: clip(0)}, {FIRST[0]: "hash"}, {}, ORIGINS)
    assert open_store(store.path).origins() == {FIRST[0]: ORIGINS[FIRST[0]], FIRST[1]: None}


def test_origins_with_any_bounds_and_names_round_trip_exactly(make_local: Make) -> None:
    store = make_local(FIRST)
    origins = {
        FIRST[0]: Origin('ü "\\|\ud800.mp4', 0, 0.1 + 0.2, 1e17),
        FIRST[1]: Origin("/elsewhere/b.mp4", 2**62, None, 1 / 3),
        FIRST[3]: Origin("/elsewhere/b.mp4", 2**62 - 1, 0.0, None),
    }
    store.write_shard(0, {n: clip(0) for n in FIRST}, dict.fromkeys(FIRST, "hash"), {}, origins)
    assert open_store(store.path).origins() == origins | {FIRST[2]: None}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"files":[["a.mp4",7]],"clips":[[0,null,null]]}',  # too few clips
        '{"files":[["a.mp4",7]],"clips":[[1,0.0,1.0],null,null,null]}',
        '{"files":[["a.mp4","7"]],"clips":[null,null,null,null]}',
        '{"files":[["a.mp4",7]],"clips":[[0,0.0,"1"],null,null,null]}',
        '{"files":[["a.mp4",7]],"clips":[[0],[0,1.0,2.0,3.0],null,null]}',
    ],
)
def test_malformed_origins_are_refused(make_local: Make, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(make_local)
    journal = raw_ledger_journal(storage_at(store.path))
    *others, last = [line.entry for line in journal.read().lines]
    journal.rewrite(lambda _: [*others, last | {"origins": text}])
    assert main(["info", str(store.path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "'origins' of a commit is" in line
    journal.rewrite(lambda _: [*others, last | {"origins": {}}])
    with pytest.raises(DamagedStore, match="does not belong there"):
        open_store(store.path)


def test_sources_are_hashed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    contents = {f"videos/{n}.mp4": bytes([n]) * 5 for n in range(3)}
    for name, content in contents.items():
        (data / name).write_bytes(content)
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, FIRST)
    origins = {name: Origin(file, 5) for name, file in zip(FIRST, contents)}
    sources = {name: hashlib.sha256(contents[o.file]).hexdigest() for name, o in origins.items()} | {FIRST[3]: "?"}
    store.write_shard(0, {n: clip(i) for i, n in enumerate(FIRST)}, sources, {}, origins)
    command = ["verify", str(store.path), "--sources", str(data)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "3 videos hashed, 0 changed, 0 gone" in out
    assert "1 clip cannot be checked: the store does not name its video" in out
    (data / "videos/0.mp4").unlink()
    assert main(command) == 0
    (data / "videos/1.mp4").write_bytes(b"other")  # of the same size
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "2 videos hashed, 1 changed, 1 gone" in out
    assert f"videos/1.mp4 has changed since 1 clip was encoded from it, such as {FIRST[1]!r}" in out
    assert f"repair {store.path} --sources {data}" in out
    assert main(["repair", str(store.path), "--sources", str(data)]) == 0
    check(store.path, {name: n for name, n in OLD.items() if name != FIRST[1]})
    assert main(command) == 0
    with pytest.raises(SystemExit) as usage:
        main(["verify", str(store.path), "--sources", str(tmp_path / "nowhere")])
    assert usage.value.code == 2


@pytest.mark.parametrize("command", ["verify", "repair"])
def test_a_folder_without_any_video_of_the_store_is_wrong_usage(
    make_local: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    store, wrong = filled(make_local), tmp_path / "wrong"
    (wrong / "nested").mkdir(parents=True)
    (wrong / "nested/a.mp4").touch()
    monkeypatch.setattr(f"egopatch.features.tools.{command}.{command}", lambda *_, **__: pytest.fail("reads the store"))
    assert main([command, str(store.path), "--sources", str(wrong), "--json"]) == 2
    out, err = capsys.readouterr()
    file = ORIGINS[FIRST[0]].file
    assert (out, err) == (
        "",
        f"features {command}: error: --sources is {str(wrong)!r}, which holds no video of the store, such as {file!r}; "
        "expected the folder that these names start from, the config's data.root\n",
    )


def test_a_store_that_names_no_video_has_none_to_find(make_local: Make, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_local(FIRST)
    store.write_shard(0, {FIRST[1]: clip(1)}, {FIRST[1]: "hash"})
    assert main(["verify", str(store.path), "--sources", str(store.path), "--json"]) == 0
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert sources == {"files": 0, "changed": {}, "gone": 0, "unrecorded": 1, "unreadable": {}}


def test_an_unreadable_video_does_not_hide_other_changes(
    make_local: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_local(FIRST)
    origins = {name: Origin(f"{n}.mp4", 5) for n, name in enumerate(FIRST)}
    store.write_shard(0, {n: clip(i) for i, n in enumerate(FIRST)}, dict.fromkeys(FIRST, "a hash"), {}, origins)
    for file in ("0.mp4", "1.mp4", "2.mp4"):
        (tmp_path / file).write_bytes(b"other")

    def refusing(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Path, *args: Any, **options: Any) -> Any:
            if path.name == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return method(path, *args, **options)

        return call

    monkeypatch.setattr(Path, "open", refusing(Path.open, "0.mp4"))
    monkeypatch.setattr(Path, "is_file", refusing(Path.is_file, "1.mp4"))
    assert main(["verify", str(store.path), "--sources", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "1 video hashed, 1 changed, 1 gone" in out
    for file in ("0.mp4", "1.mp4"):
        assert f"  {file} cannot be read: {tmp_path / file}: Permission denied; give this user permission" in out
    assert main(["repair", str(store.path), "--sources", str(tmp_path)]) == 1
    assert "so it may have changed; nothing was repaired: make it readable" in capsys.readouterr().err
    assert open_store(store.path).clip_ids == FIRST


def test_source_hashing_uses_only_the_cores_of_this_process(
    make_local: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, **options: str) -> None:
            counts.append(workers)
            super().__init__(workers, **options)

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr("egopatch.features.tools.sources.ThreadPoolExecutor", Pool)
    video = tmp_path / ORIGINS[FIRST[0]].file
    video.parent.mkdir()
    video.write_bytes(b"video")
    check_sources(filled(make_local).path, tmp_path)
    assert counts == [1]


ONE, TWO = "x86_64 CPU, AVX2, torch 1", "NVIDIA H100, torch 2"


def test_info_lists_the_machines_that_computed_the_clips(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make(FIRST)
    store.write_shard(0, {FIRST[3]: clip(3)}, {FIRST[3]: "hash"})  # as by an earlier version
    store.write_shard(
        0, {n: clip(0) for n in FIRST[:2]}, dict.fromkeys(FIRST, "hash"), machines={FIRST[0]: ONE, FIRST[1]: ONE}
    )
    assert open_store(store.path).machines() == read_ledger(store.path).machines() == {"": 1, ONE: 2}
    assert main(["info", str(store.path)]) == 0
    said = capsys.readouterr().out
    assert f"  {ONE}: 2" in said
    assert "  not recorded: 1" in said
    assert "machines of different kinds" not in said

    store.write_shard(0, {FIRST[2]: clip(2)}, {FIRST[2]: "hash"}, machines={FIRST[2]: TWO})
    refresh(open_store(store.path))
    assert open_store(store.path).machines() == {"": 2, ONE: 1, TWO: 1}
    assert main(["info", str(store.path)]) == 0
    assert (
        f"machines of different kinds computed these clips, so their last bits may differ: 1 by {ONE}; 1 by {TWO}"
        in capsys.readouterr().out
    )
    assert main(["info", str(store.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machines"] == {"not recorded": 2, ONE: 1, TWO: 1}
    assert convert(store.path, tmp_path / "copy", shard=3).machines() == {"": 2, ONE: 1, TWO: 1}
    store.rewrite_shard(0, without=[FIRST[1]])
    assert open_store(store.path).machines() == {"": 2, TWO: 1}


@pytest.mark.parametrize(
    "machines",
    [[], {}, {"names": [ONE], "clips": [0]}, {"names": [ONE], "clips": [0, 0, 0, 1]}, {"names": ONE, "clips": []}],
)
def test_malformed_machine_records_are_refused(make_local: Make, machines: object) -> None:
    store = filled(make_local)
    journal = raw_ledger_journal(storage_at(store.path))
    *others, last = [line.entry for line in journal.read().lines]
    journal.rewrite(lambda _: [*others, last | {"machines": machines}])
    with pytest.raises(DamagedStore, match="does not belong there"):
        open_store(store.path)
