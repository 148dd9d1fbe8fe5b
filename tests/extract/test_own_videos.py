"""`extract videos`: a folder of videos becomes a store, a clips file and a config, without annotations."""

import errno
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from egopatch.configs.command_line import load_config
from egopatch.configs.packaged import packaged_config
from egopatch.extract.__main__ import main
from egopatch.extract.commands.videos import ENCODERS
from egopatch.extract.datasets import DatasetError
from egopatch.extract.datasets.folder import cut, find_videos
from egopatch.extract.planning.own_videos import prepare_own_videos
from egopatch.features import open_store
from egopatch.features.io import files
from tests.extract.video.videos import write_video
from tests.json_keys import documented_keys

SMALL = ("--video.frames", "2", "--video.size", "32", "--encoder.depth", "6", "--engine.decoders", "1")


def test_remainder_under_half_a_clip_is_merged_into_the_last_clip() -> None:
    def stretches(duration_s: float | None, clip_s: float | None) -> list[tuple[float | None, float | None]]:
        return [(clip.start_s, clip.end_s) for clip in cut("a.mp4", Path("a.mp4"), duration_s, clip_s)]

    assert stretches(34.9, 10) == [(0, 10), (10, 20), (20, None)]
    assert stretches(35.0, 10) == [(0, 10), (10, 20), (20, 30), (30, None)]
    assert stretches(0.5, 0.1) == [(0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, None)]
    for whole in (stretches(9, 10), stretches(None, 10), stretches(100, None)):
        assert whole == [(None, None)]
    names = ["a.mp4@0s", "a.mp4@7.5s", "a.mp4@15s"]
    assert [clip.clip_id for clip in cut("a.mp4", Path("x"), 20, 7.5)] == names
    assert [clip.clip_id for clip in cut("a.mp4", Path("x"), 3, 7.5)] == ["a.mp4"]


def test_find_videos_lists_a_folder_and_refuses_bad_input(tmp_path: Path) -> None:
    for name in ("b.MP4", "P01/a.mkv", "P01/notes.txt", ".hidden/c.mp4", "._b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_videos(tmp_path) == {"P01/a.mkv": tmp_path / "P01" / "a.mkv", "b.MP4": tmp_path / "b.MP4"}
    assert find_videos(tmp_path / "b.MP4") == {"b.MP4": tmp_path / "b.MP4"}
    (tmp_path / "annexed.mp4").symlink_to("nowhere.mp4")
    assert "annexed.mp4" in find_videos(tmp_path)
    (tmp_path / "new\nline.mp4").touch()
    with pytest.raises(DatasetError, match=r"cannot be the name of a clip .* rename the file"):
        find_videos(tmp_path)
    with pytest.raises(DatasetError, match=r"none: no such file or folder; expected a folder with videos, or a"):
        find_videos(tmp_path / "none")
    (tmp_path / "videos.ZIP").touch()
    with pytest.raises(DatasetError, match="is an archive; unpack it, and name the folder with the videos"):
        find_videos(tmp_path / "videos.ZIP")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"contains no video; expected files that end in \.3gp"):
        find_videos(tmp_path / "empty")


def test_find_videos_refuses_what_it_cannot_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("open", "closed", "lost+found"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").touch()
    scan = os.scandir

    def refusing(path: Path) -> Any:
        if Path(path).name in ("closed", "lost+found"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)  # the superuser may read everything
    with pytest.raises(PermissionError, match="closed"):
        find_videos(tmp_path)
    (tmp_path / "closed").rename(tmp_path / ".closed")
    assert list(find_videos(tmp_path)) == ["open/a.mp4"]  # the disk's own folder is nobody's
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DatasetError, match=r"pipe\.mp4: is neither a file nor a folder; expected a folder with"):
        find_videos(tmp_path / "pipe.mp4")


def test_find_videos_follows_links_to_folders_and_lists_no_folder_twice(tmp_path: Path) -> None:
    videos, disk = tmp_path / "videos", tmp_path / "disk"
    for name in ("videos/P01/a.mp4", "videos/z/b.mp4", "disk/P02/c.mp4", "disk/P02/.hidden/d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (videos / "P02").symlink_to(disk / "P02")
    (videos / ".P02").symlink_to(disk / "P02")
    (videos / "P03").symlink_to(disk / "P02")  # also P02
    (videos / "P01" / "again").symlink_to(videos / "z")  # would change the ids of a store that has z/b.mp4
    (videos / "P01" / "loop").symlink_to("..")
    (disk / "P02" / "loop").symlink_to(disk)
    (videos / "gone").symlink_to("nowhere")
    assert find_videos(videos) == {name: videos / name for name in ("P01/a.mp4", "P02/c.mp4", "z/b.mp4")}
    (tmp_path / "link").symlink_to(videos)
    assert list(find_videos(tmp_path / "link")) == ["P01/a.mp4", "P02/c.mp4", "z/b.mp4"]


@pytest.mark.slow
def test_videos_command_turns_a_folder_into_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_text_network(*_: object) -> None:
        raise AssertionError("there are no questions to encode")

    monkeypatch.setattr("egopatch.extract.run.find_text_network", no_text_network)
    videos = tmp_path / "videos"
    (videos / "P01").mkdir(parents=True)
    write_video(videos / "P01" / "a.mp4", frames=35)  # 2.3 s
    write_video(videos / "short.mp4", frames=5)
    (videos / "bad.mp4").write_bytes(b"no video")
    command = ["videos", str(videos), "--out", str(tmp_path / "out" / "mine"), "--clip-seconds", "1", *SMALL]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "3 videos, 4 clips" in out
    file = tmp_path / "out" / "mine.yaml"
    retry = f"then run `egopatch extract retry --config {shlex.quote(str(file))}`"
    assert "quarantined bad.mp4: video" in out
    assert retry in out
    assert "3/4 clips and 0 questions stored; this run encoded 3 clips" in out
    store = open_store(tmp_path / "out" / "mine")
    assert store.clip_ids == ("P01/a.mp4@0s", "P01/a.mp4@1s", "short.mp4")
    timestamps = store.read(["P01/a.mp4@1s"]).timestamps
    assert timestamps is not None
    assert 0 <= float(timestamps[0, 0]) < float(timestamps[0, 1]) < 1.34

    assert main(["status", "--config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missing"] == 0
    assert main(["status", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert "first in quarantine: bad.mp4: video" in out
    assert retry in out
    assert main([*command, "--video.frames", "3"]) == 2
    line = capsys.readouterr().err.strip()
    assert "mine.yaml is the config of this store and has different settings (frames: file has 2, requested 3)" in line

    # Questions added to the config by hand; the command then leaves the config unchanged.
    write_video(videos / "new.mp4", frames=5)
    question = {"question_id": "1", "clip_id": "short.mp4", "question": "What?", "answer": "cup", "part": "test"}
    (tmp_path / "out" / "mine.questions.jsonl").write_text(json.dumps(question))
    file.write_text(file.read_text().replace("questions: null", "questions: mine.questions.jsonl"))
    edited = file.read_text()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)  # the config works from any folder
    assert main([*command, "--json"]) == 0
    shown = capsys.readouterr()
    assert "4/5 clips and 1 question stored; this run encoded 1 clip" in shown.err
    result = json.loads(shown.out)
    assert (result["videos"], result["config"]) == (4, str(file))
    assert result.keys() == documented_keys("extract videos")
    (of_store,) = result["stores"]
    assert (of_store["clips"], of_store["texts"], list(of_store["quarantine"])) == (4, 1, ["bad.mp4"])
    assert file.read_text() == edited
    assert open_store(tmp_path / "out" / "mine" / "text").clip_ids == ("What?",)


def test_clips_of_removed_videos_are_no_longer_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise every run would suggest retrying a video that cannot be repaired."""
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "kept.mp4", frames=5)
    write_video(videos / "removed.mp4", frames=5)
    (videos / "bad.mp4").write_bytes(b"no video")
    command = ["videos", str(videos), "--out", str(tmp_path / "mine"), *SMALL]
    assert main(command) == 0
    assert "2/3 clips" in capsys.readouterr().out
    (videos / "removed.mp4").unlink()
    (videos / "bad.mp4").unlink()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "1/1 clips and 0 questions stored; this run encoded 0 clips, nothing is missing" in out
    assert "the store also has 1 clip that these annotations do not name" in out
    assert "quarantine" not in out
    assert main(["plan", "--config", str(tmp_path / "mine.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["clips"], plan["done"], plan["quarantined"], plan["todo"]) == (1, 1, 0, 0)
    assert main(["status", "--config", str(tmp_path / "mine.yaml"), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert [status[name] for name in ("planned", "committed", "quarantined", "missing", "others")] == [1, 1, 0, 0, 1]
    assert main(["status", "--config", str(tmp_path / "mine.yaml")]) == 0
    out = capsys.readouterr().out
    assert "1/1 clips committed, 0 quarantined, 0 missing" in out
    assert "the store also has 1 clip that these annotations do not name" in out
    assert "retry" not in out
    assert len(open_store(tmp_path / "mine").clip_ids) == 2


@pytest.mark.parametrize("store", ["mine", "stores/mine"])
@pytest.mark.slow
def test_a_moved_folder_is_refused_until_its_config_names_the_new_place(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_video(old / "a.mp4", frames=5)
    assert main(["videos", str(old), "--out", str(old / store), *SMALL]) == 0
    old.rename(new)
    capsys.readouterr()
    again = ["videos", str(new), "--out", str(new / store), *SMALL]
    assert main(again) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is the config of store {old / store}, but --out is {new / store}; if the folder was moved, move it" in line
    file = new / f"{store}.yaml"
    file.write_text(file.read_text().replace(str(old), str(new)))
    inside = store == "mine"  # the folder of the store holds the videos, whose names in the store are then relative
    assert main(again) == (0 if inside else 1)
    shown = capsys.readouterr()
    if inside:
        assert "this run encoded 0 clips, nothing is missing" in shown.out
        return
    assert f"run `egopatch extract run --config {file} --refresh` to encode them again" in shown.err
    assert main(["run", "--config", str(file), "--refresh"]) == 0
    assert "this run encoded 1 clip" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "then"),
    [("1", "0.5"), *[pytest.param(*more, marks=pytest.mark.slow) for more in (("1", None), (None, "1"))]],
)
def test_clips_of_another_length_are_refused(
    first: str | None, then: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store would keep both, and an export by video would write both into one file."""
    videos = tmp_path / "videos"
    videos.mkdir()
    write_video(videos / "a.mp4", frames=35)  # 2.3 s
    write_video(videos / "short.mp4", frames=5)

    def run(seconds: str | None) -> int:
        length = () if seconds is None else ("--clip-seconds", seconds)
        return main(["videos", str(videos), "--out", str(tmp_path / "mine"), *length, *SMALL])

    assert run(first) == 0
    clips = (tmp_path / "mine.clips.jsonl").read_text()
    capsys.readouterr()
    assert run(then) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--clip-seconds is {then or 'not given'}, but was {first or 'not given'} for the clips in store" in line
    assert (tmp_path / "mine.clips.jsonl").read_text() == clips
    write_video(videos / "new.mp4", frames=35)
    assert run(first) == 0


@pytest.mark.parametrize("repaired", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_video_that_is_repaired_or_replaced_by_a_longer_one_may_be_cut(tmp_path: Path, repaired: bool) -> None:
    """It was a single clip before; where nothing else was cut either, nothing tells the length of clips."""
    write_video(tmp_path / "a.mp4", frames=5)
    if repaired:  # before, none of it can be decoded
        (tmp_path / "a.mp4").rename(tmp_path / "short.mp4")
        (tmp_path / "a.mp4").write_bytes(b"no video")
    command = ["videos", str(tmp_path), "--out", str(tmp_path / "out" / "mine"), "--clip-seconds", "1", *SMALL]
    assert main(command) == 0
    write_video(tmp_path / "a.mp4", frames=35)
    assert main(command) == 0
    assert open_store(tmp_path / "out" / "mine").clip_ids == (
        "short.mp4" if repaired else "a.mp4", "a.mp4@0s", "a.mp4@1s"
    )  # fmt: skip


def test_invalid_options_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", frames=2)
    for more, expected in (
        (["--encoder", "egovlp"], f"--encoder is 'egovlp'; expected one of {', '.join(ENCODERS)}"),
        (["--out", "s3://bucket/x"], "--out is s3://bucket/x; expected a folder"),
        (["--clip-seconds", "0.01"], "--clip-seconds is 0.01; expected at least 0.1"),
    ):
        assert main(["videos", str(tmp_path), "--out", str(tmp_path / "s"), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


def test_two_commands_at_once_may_write_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4")
    arguments = tmp_path, tmp_path / "s", load_config(packaged_config(ENCODERS["lite"])), None
    sync_file = files.sync_file

    def sync_after_another_command(path: Path) -> None:
        monkeypatch.setattr(files, "sync_file", sync_file)
        prepare_own_videos(*arguments)
        sync_file(path)

    monkeypatch.setattr(files, "sync_file", sync_after_another_command)
    own = prepare_own_videos(*arguments)
    assert own.clips_file.is_file()
    assert own.config_file.is_file()


def test_command_in_the_config_file_is_shell_quoted(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=2)
    base = load_config(packaged_config(ENCODERS["lite"]), [])
    file = prepare_own_videos(tmp_path, tmp_path / "Mia's store", base, None).config_file
    command = file.read_text().split("`")[1]
    assert shlex.split(command) == ["extract", "run", "--config", "Mia's store.yaml"]


def test_failed_attempt_leaves_no_files_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", frames=2)
    (tmp_path / "s").mkdir()
    command = ["videos", str(tmp_path), "--out", str(tmp_path / "s")]
    for encoder in ("dinov2", "egovlpv2"):
        assert main([*command, "--encoder", encoder, "--encoder.checkpoint", str(tmp_path / "none")]) == 2
        assert str(tmp_path / "none") in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "s"]


def test_failed_attempt_keeps_existing_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", frames=2)
    absent = tmp_path / "none"
    base = load_config(packaged_config(ENCODERS["lite"]), ["--encoder.checkpoint", str(absent)])
    file = prepare_own_videos(tmp_path, tmp_path / "s", base, None).config_file
    command = ["videos", str(tmp_path), "--out", str(tmp_path / "s"), "--encoder.checkpoint", str(absent)]
    assert main(command) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "s.clips.jsonl", "s.yaml"]
    capsys.readouterr()
    assert main([*command, "--video.frames", "3"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"extract videos: error: {file} is the config of this store")
    assert line.endswith("or the original settings, or delete s.yaml: no store exists yet")


def test_output_path_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", frames=2)
    (tmp_path / "s").touch()
    assert main(["videos", str(tmp_path), "--out", str(tmp_path / "s")]) == 2
    assert f"--out is '{tmp_path / 's'}', which is a file; expected a folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "s"]


@pytest.mark.parametrize("file", ENCODERS.values())
def test_encoder_short_names_have_a_packaged_config(file: str) -> None:
    assert load_config(packaged_config(file)).data.name == "jsonl"
