"""Copies that hold every frame of a clip at its time, are resumed, verified and used like the data set itself."""

import fcntl
import json
import shlex
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from egopatch.configs.schema import Config, DataConfig, EngineConfig, VideoConfig
from egopatch.extract.__main__ import main
from egopatch.extract.datasets import Clip, load_dataset
from egopatch.extract.transcoding import copies, segment
from egopatch.extract.transcoding.segment import write_segment
from egopatch.extract.video.container import open_video
from egopatch.extract.video.frames import read_frames
from egopatch.extract.video.indexing.index import VideoError
from tests.extract.video.odd_videos import kept, moving
from tests.extract.video.videos import B_FRAMES, frame_numbers, show_turned, start_at, write_video

QUESTION = {"question_id": "1", "clip_id": "whole", "question": "what?", "answer": "cup", "part": "train"}


def copied(clip: Clip, folder: Path) -> Path:
    write_segment(clip, VideoConfig(), folder=folder)
    return folder / f"{clip.clip_id}.mp4"


def test_copy_keeps_the_frames_and_times_of_its_clip(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", frames=38, options={**B_FRAMES, "g": "250"})
    for clip in (Clip("whole", video), Clip("P01/part", video, 0.5, 2.1)):
        path = copied(clip, tmp_path / "out")
        for frames in (4, 16):
            expected = read_frames(clip, VideoConfig(frames=frames))
            got = read_frames(Clip(clip.clip_id, path), VideoConfig(frames=frames))
            assert frame_numbers(got.frames) == frame_numbers(expected.frames)
            shift = expected.times_s[0] - got.times_s[0]
            np.testing.assert_allclose(got.times_s + shift, expected.times_s, atol=1e-3)
    with open_video(tmp_path / "out" / "whole.mp4") as file:
        assert file.index.starts_s[file.index.keys[:, 2]].tolist() == [0.0, 1.0, 2.0]


def test_large_videos_are_scaled_down_and_small_ones_are_not(tmp_path: Path) -> None:
    sizes = {(640, 360): (512, 288), (96, 64): (96, 64), (360, 640): (288, 512), (97, 61): (96, 60)}
    for size, small in sizes.items():
        path = copied(Clip("a", write_video(tmp_path / "a.mp4", frames=3, size=size)), tmp_path / "out")
        with av.open(str(path)) as file:
            assert (file.streams.video[0].width, file.streams.video[0].height) == small


@pytest.mark.parametrize(
    "name", ["turned", "edit list", "varying rate", "packed b-frames", "no first key frame", "one frame"]
)
def test_unusual_videos_are_copied_correctly(name: str, tmp_path: Path) -> None:
    make = {
        "turned": lambda: show_turned(write_video(tmp_path / "a.mp4", draw=moving), (0, 1, -1, 0)),
        "edit list": lambda: start_at(write_video(tmp_path / "a.mp4", options=B_FRAMES), 5),
        "varying rate": lambda: write_video(tmp_path / "a.mp4", draw=moving, pts=[i * i for i in range(30)]),
        "packed b-frames": lambda: kept("packed_bframes.avi")(tmp_path),
        "no first key frame": lambda: kept("hidden_frames.webm")(tmp_path),
        "one frame": lambda: write_video(tmp_path / "a.mp4", frames=1),
    }
    clip = Clip("a", make[name]())
    path = copied(clip, tmp_path / "out")
    got, expected = (read_frames(one, VideoConfig(frames=4)) for one in (Clip("a", path), clip))
    np.testing.assert_allclose(np.diff(got.times_s), np.diff(expected.times_s), atol=1e-3)
    for one, other in zip(got.frames, expected.frames, strict=True):
        height, width = (extent // 2 * 2 for extent in other.shape[:2])
        if one.shape == other.shape == (height, width, 3):
            assert np.abs(one.astype(int) - other).mean() < 16


def test_copy_with_wrong_frames_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never renamed to its final name."""
    video = write_video(tmp_path / "a.mp4")
    small = segment._small
    monkeypatch.setattr(segment, "_small", lambda file, rows: reversed(list(small(file, rows))))
    times = segment._write

    def other_means(*args: object) -> object:
        times_s, means = times(*args)  # type: ignore[arg-type]
        return times_s, means[::-1]

    monkeypatch.setattr(segment, "_write", other_means)
    with pytest.raises(VideoError, match=r"cannot be used: its frame at 0\.000 s has different colours"):
        copied(Clip("a", video), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def data_set(root: Path) -> list[str]:
    """Three clips of one video with a long group, one of them without a video file."""
    root.mkdir()
    write_video(root / "long.mp4", frames=38, options={**B_FRAMES, "g": "250"})
    clips = [
        {"clip_id": "whole", "video": "long.mp4"},
        {"clip_id": "part", "video": "long.mp4", "start_s": 0.5, "end_s": 2.1},
        {"clip_id": "gone", "video": "gone.mp4"},
    ]
    (root / "clips.jsonl").write_text("".join(f"{json.dumps(clip)}\n" for clip in clips))
    (root / "questions.jsonl").write_text(json.dumps(QUESTION) + "\n")
    return ["--data.name", "jsonl", "--data.root", str(root), "--engine.decoders", "1"]


def test_annotations_are_written_by_one_job_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_set(tmp_path / "data")
    monkeypatch.setattr(copies, "_is_copied", lambda *_: True)
    locked: list[bool] = []

    def write_annotations(_: Config, out: Path, *__: object) -> None:
        with (out / copies.JOURNAL).open("rb") as journal:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(True)

    monkeypatch.setattr(copies, "_write_annotations", write_annotations)
    config = Config(data=DataConfig(name="jsonl", root=tmp_path / "data"), engine=EngineConfig(decoders=1))
    copies.transcode(config, tmp_path / "out")
    assert locked == [True]


@pytest.mark.slow
def test_an_interrupted_job_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, out = data_set(tmp_path / "data"), tmp_path / "out"
    command = ["transcode", *options, "--out", str(out)]
    assert main(command) == 1  # a clip has no video
    first = capsys.readouterr()
    assert "2 clips transcoded" in first.out
    assert "failed gone: video" in first.err
    write_video(tmp_path / "data" / "gone.mp4", frames=20)
    (out / "videos" / "part.mp4").write_bytes(b"cut off")
    before = (out / "videos" / "whole.mp4").stat()
    with (out / "transcoded.jsonl").open("a") as journal:
        journal.write('{"clip_id": "par')  # as a crash leaves it
    (out / "videos" / ".gone.mp4.0123").touch()
    assert main(command) == 0
    assert "2 clips transcoded" in capsys.readouterr().out
    assert (out / "videos" / "whole.mp4").stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(path.name for path in (out / "videos").iterdir()) == ["gone.mp4", "part.mp4", "whole.mp4"]
    assert main(command) == 0
    assert "0 clips transcoded" in capsys.readouterr().out
    dataset = load_dataset(DataConfig(name="jsonl", root=out))
    assert [clip.video for clip in dataset.clips] == [
        out / "videos" / f"{name}.mp4" for name in ("gone", "part", "whole")
    ]


def test_a_video_that_was_replaced_is_copied_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, out = data_set(tmp_path / "data"), tmp_path / "out"
    main(["transcode", *options, "--out", str(out)])
    write_video(tmp_path / "data" / "long.mp4", frames=36)
    capsys.readouterr()
    main(["transcode", *options, "--out", str(out)])
    assert "2 clips transcoded" in capsys.readouterr().out


def test_copy_of_a_clip_that_ends_later_than_its_video_does_so_too(tmp_path: Path) -> None:
    """`extract run` then notes the clip of the copy as it notes that of the video."""
    options, out = data_set(tmp_path / "data"), tmp_path / "out"
    with (tmp_path / "data" / "clips.jsonl").open("a") as clips:
        clips.write('{"clip_id": "beyond", "video": "long.mp4", "start_s": 0.7, "end_s": 7.5}\n')
    for _ in range(2):  # a second job finds the copies, and writes the annotations again
        main(["transcode", *options, "--out", str(out)])
        for clip in load_dataset(DataConfig(name="jsonl", root=out)).clips:
            assert (clip.end_s is None) == (clip.clip_id != "beyond")
        source, copy = (
            next(clip for clip in load_dataset(DataConfig(name="jsonl", root=root)).clips if clip.clip_id == "beyond")
            for root in (tmp_path / "data", out)
        )
        expected, got = (read_frames(clip, VideoConfig(frames=4)) for clip in (source, copy))
        assert frame_numbers(got.frames) == frame_numbers(expected.frames)
        assert got.missing_s == pytest.approx(expected.missing_s, abs=1e-3)
        assert got.missing_s > 4


def test_folder_in_the_hint_is_shell_quoted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "Mia's copies"
    main(["transcode", *data_set(tmp_path / "data"), "--out", str(out)])
    assert f"use them with --data.root {shlex.quote(str(out))} and another --store.path" in capsys.readouterr().out


def test_overwriting_the_source_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = data_set(tmp_path / "data")
    assert main(["transcode", *options, "--out", str(tmp_path / "data")]) == 2
    assert "which is data.root; give another folder" in capsys.readouterr().err
    clips = tmp_path / "data" / "clips.jsonl"
    before = clips.read_bytes()
    for name in (str(clips), "../data/clips.jsonl"):
        assert main(["transcode", *options, "--data.clips", name, "--out", str(tmp_path / "out")]) == 2
        assert f"data.clips is {name!r}, which is outside data.root; expected a file in" in capsys.readouterr().err
    assert clips.read_bytes() == before


@pytest.mark.slow
def test_transcoded_egotaskqa_keeps_its_clips_and_questions(made: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(made / "data", data)
    for path in sorted((data / "qa_videos").iterdir())[4:]:
        path.unlink()
    assert main(["transcode", "--data.root", str(data), "--engine.decoders", "1", "--out", str(tmp_path / "out")]) == 1
    one, other = (load_dataset(DataConfig(root=root)) for root in (data, tmp_path / "out"))
    assert [clip.clip_id for clip in one.clips] == [clip.clip_id for clip in other.clips]
    assert (one.questions, one.answers) == (other.questions, other.answers)
    assert sorted(path.name for path in (data / "qa_videos").iterdir()) == sorted(
        path.name for path in (tmp_path / "out" / "qa_videos").iterdir()
    )
