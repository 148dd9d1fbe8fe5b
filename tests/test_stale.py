"""Clips that change after encoding: every command reports them, and nothing trains on their old features.

Six clips of three videos are encoded once. Each stage then changes the annotations or the videos in one way.
"""

import json
import os
import shlex
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import Config
from egopatch.extract import run as run_module
from egopatch.extract.__main__ import main as extract
from egopatch.extract.datasets import load_dataset
from egopatch.extract.datasets.origins import origin_of
from egopatch.extract.worker.device import describe_machine
from egopatch.features import AbsentClip, open_store
from egopatch.features.__main__ import main as features
from egopatch.features.common.units import counted
from egopatch.features.io import file_lease
from egopatch.features.state.ledger import raw_ledger_journal
from egopatch.features.storage.pick import storage_at
from egopatch.train.__main__ import main as train
from egopatch.train.fitting.experiment import open_experiment
from tests.extract.job import start_job
from tests.extract.video.videos import write_video

Records = list[dict]
PARTS = ("train", "train", "val", "train", "test", "train")


def options(root: Path, *more: str) -> list[str]:
    """A small network on six clips, three shards of two."""
    return [
        *("--config", "configs/demo/egovlpv2.yaml", "--data.name", "jsonl", "--data.root", str(root / "data")),
        *("--encoder.checkpoint", str(root / "weights.pth"), "--text.model", str(root / "tokenizer")),
        *("--store.path", str(root / "store"), "--store.shard", "2", "--engine.decoders", "1", "--encoder.batch", "2"),
        *("--run.dir", str(root / "run"), "--head.name", "egovlp", "--train.epochs", "1", "--train.device", "cpu"),
        *more,
    ]


def config_of(root: Path) -> Config:
    args = options(root)
    return load_config(Path(args[1]), args[2:])


def write_lines(path: Path, records: Records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    (root / "data").mkdir()
    clips: Records = []
    for number in range(3):
        write_video(root / "data" / f"{number}.mp4", frames=20, fps=10, first=7 * number)
        for half in (0, 1):
            clip = {"clip_id": f"c{2 * number + half}", "video": f"{number}.mp4"}
            clips.append({**clip, "start_s": float(half), "end_s": half + 1.0})
    write_lines(root / "data" / "clips.jsonl", clips)
    questions = [
        {"question_id": f"{clip['clip_id']}-{answer}", "clip_id": clip["clip_id"], "question": f"is it {answer}?",
         "answer": answer, "part": part}
        for clip, part in zip(clips, PARTS, strict=True) for answer in ("red", "yes")
    ]  # fmt: skip
    write_lines(root / "data" / "questions.jsonl", questions)
    assert extract(["standin", *options(root)]) == 0
    assert extract(["run", *options(root)]) == 0
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "root")
    return tmp_path / "root"


def change(root: Path, edit: Callable[[Records], object]) -> None:
    """Apply `edit` to the clips' annotations."""
    path = root / "data" / "clips.jsonl"
    clips = [json.loads(line) for line in path.read_text().splitlines()]
    edit(clips)
    write_lines(path, clips)


def move(root: Path) -> None:
    change(root, lambda clips: clips[1].update(start_s=0.5, end_s=1.5))


def cut_again(root: Path) -> None:
    change(root, lambda clips: clips[1].update(end_s=1.75))


def cut_to_the_end(root: Path) -> None:
    change(root, lambda clips: clips[1].pop("end_s"))


def point_elsewhere(root: Path) -> None:
    change(root, lambda clips: clips[1].update(video="2.mp4"))


def encode_video_again(root: Path) -> None:
    write_video(root / "data" / "0.mp4", frames=20, fps=10, first=1, size=(128, 96))


def reorder(root: Path) -> None:
    change(root, lambda clips: clips.reverse())


def delete_video(root: Path) -> None:
    (root / "data" / "0.mp4").unlink()


def touch_video(root: Path) -> None:
    os.utime(root / "data" / "0.mp4", (1, 1))


def move_data(root: Path) -> None:
    """The data set is in another folder, as on another machine."""
    (root / "data").rename(root / "moved")
    (root / "data").symlink_to(root / "moved")


def another_set(root: Path) -> None:
    """Another data set with the same ids, and one clip more."""
    for number in range(3):
        (root / "data" / f"{number}.mp4").rename(root / "data" / f"kitchen-{number}.mp4")

    def edit(clips: Records) -> None:
        for clip in clips:
            clip["video"] = "kitchen-" + clip["video"]
        clips.append({"clip_id": "new", "video": "kitchen-0.mp4"})

    change(root, edit)


ALL = {f"c{number}" for number in range(6)}
STALE: dict[Callable[[Path], None], tuple[set[str], str]] = {
    move: ({"c1"}, "stretch is 0.5 s to 1.5 s now, but its row was made from 1 s to 2 s"),
    cut_again: ({"c1"}, "stretch is 1 s to 1.75 s now, but its row was made from 1 s to 2 s"),
    cut_to_the_end: ({"c1"}, "stretch is 1 s to end now, but its row was made from 1 s to 2 s"),
    point_elsewhere: ({"c1"}, "video is 2.mp4 now, but its row was made from 0.mp4"),
    encode_video_again: ({"c0", "c1"}, "bytes when its row was made"),
    another_set: (ALL, "video is kitchen-0.mp4 now, but its row was made from 0.mp4"),
}
CURRENT = (reorder, delete_video, touch_video, move_data)


def contents(store: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "stage",
    [s if s in (move, encode_video_again) else pytest.param(s, marks=pytest.mark.slow) for s in STALE],
    ids=lambda stage: stage.__name__,
)
def test_stale_clips_are_named_and_never_used(
    stage: Callable[[Path], None], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(root)
    stale, reason = STALE[stage]
    before = contents(root / "store")
    capsys.readouterr()

    assert extract(["status", *options(root, "--json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["stale"]) == stale
    assert reason in next(iter(found["stale"].values()))
    assert found["committed"] == 6
    assert extract(["status", *options(root)]) == 0
    said = capsys.readouterr().out
    told = counted(len(stale), "clip is stale: ", "clips are stale: ")
    again = shlex.join(["egopatch", "extract", "run", *options(root), "--refresh"])
    assert told in said
    assert f"run `{again}`" in said
    assert extract(["doctor", *options(root)]) == 1
    assert f"`{again}` encodes them again" in capsys.readouterr().out

    assert extract(["doctor", *options(root, "--json")]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    (finding,) = (finding for finding in findings if finding["what"].startswith("stale clips"))
    assert (finding["severity"], finding["count"]) == ("fault", len(stale))
    assert reason in finding["found"][0]

    assert extract(["plan", *options(root, "--probe", "0", "--json")]) == 1
    plan = json.loads(capsys.readouterr().out)
    assert set(plan["stale"]) == stale
    assert any(told in line for line in plan["refusals"])
    assert extract(["plan", *options(root, "--probe", "0")]) == 1
    assert f"run `{again}`" in capsys.readouterr().out

    for command, run in ((extract, "run"), (train, "fit")):
        assert command([run, *options(root)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
        assert reason in line
        assert f"run `{again}`" in line
        assert "another store.path if the store holds another data set" in line
    assert contents(root / "store") == before  # not even a row for a new clip


@pytest.mark.parametrize("stage", CURRENT, ids=lambda stage: stage.__name__)
def test_harmless_changes_do_not_make_clips_stale(
    stage: Callable[[Path], None], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(root)
    capsys.readouterr()
    assert extract(["status", *options(root, "--json")]) == 0
    assert json.loads(capsys.readouterr().out)["stale"] == {}
    assert extract(["doctor", *options(root, "--json")]) == 0
    assert not any("stale" in finding["what"] for finding in json.loads(capsys.readouterr().out)["findings"])
    assert extract(["plan", *options(root, "--probe", "0")]) == 0
    assert "stale" not in capsys.readouterr().out
    open_experiment(config_of(root))
    if stage is not move_data:  # runs once for all of them
        return
    assert extract(["run", *options(root)]) == 0
    out = capsys.readouterr().out
    assert "this run encoded 0 clips" in out
    assert "stale: c" not in out


def test_stale_clips_without_questions_do_not_block_training(root: Path) -> None:
    path = root / "data" / "questions.jsonl"
    write_lines(path, [q for line in path.read_text().splitlines() if (q := json.loads(line))["clip_id"] != "c1"])
    move(root)
    assert "c1" not in open_experiment(config_of(root)).train_table.clips


@pytest.mark.slow
def test_refresh_encodes_the_stale_clips_and_no_others(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = open_store(root / "store").read(sorted(ALL)).patches
    encode_video_again(root)  # c0, c1
    change(root, lambda clips: clips[2].update(start_s=0.25))
    change(root, lambda clips: clips.append({"clip_id": "new", "video": "2.mp4"}))
    capsys.readouterr()
    assert extract(["run", *options(root, "--refresh")]) == 0
    assert "7/7 clips" in (out := capsys.readouterr().out)
    assert "this run encoded 4 clips" in out
    assert "stale: c" not in out
    assert extract(["run", *options(root, "--store.path", str(root / "anew"))]) == 0
    ids = [*sorted(ALL), "new"]
    refreshed, anew = open_store(root / "store"), open_store(root / "anew")
    assert refreshed.origins() == anew.origins()
    assert refreshed.sources(ids) == anew.sources(ids)
    for name, tensor in anew.read(ids).tensors().items():
        assert torch.equal(refreshed.read(ids).tensors()[name], tensor), name
    same = [torch.equal(old[n], refreshed.read([name]).patches[0]) for n, name in enumerate(sorted(ALL))]
    assert same == [False, False, False, True, True, True]
    capsys.readouterr()
    assert extract(["run", *options(root)]) == 0
    assert "this run encoded 0 clips" in capsys.readouterr().out
    experiment = open_experiment(config_of(root))
    assert torch.equal(experiment.features.tokens(["c0"]).patches, anew.read(["c0"]).patches)


def test_a_stale_clip_that_cannot_be_encoded_again_is_quarantined(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "data" / "0.mp4").write_bytes(b"not a video")
    capsys.readouterr()
    assert extract(["run", *options(root, "--refresh")]) == 0
    out = capsys.readouterr().out
    assert "4/6 clips" in out
    assert "quarantined c0: " in out
    assert "quarantined c1: " in out
    assert extract(["status", *options(root, "--json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["committed"], found["quarantined"], found["stale"]) == (4, 2, {})
    experiment = open_experiment(config_of(root))
    encoded = {name for table in experiment.encoded.values() for name in table.clips}
    assert {name for table in experiment.tables.values() for name in table.clips} - encoded == {"c0", "c1"}
    with pytest.raises(AbsentClip):
        open_store(root / "store").read(["c0"])
    assert features(["verify", str(root / "store")]) == 0


def test_store_from_an_earlier_version_reports_unrecorded_origins(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = raw_ledger_journal(storage_at(root / "store"))
    journal.rewrite(lambda lines: [{k: value for k, value in line.items() if k != "origins"} for line in lines])
    move(root)
    capsys.readouterr()
    note = "6 clips came without stretch and video file, from `features import` or an earlier version"
    for command in ("status", "run"):
        assert extract([command, *options(root)]) == 0
        out = capsys.readouterr().out
        assert note in out
        assert "stale: c" not in out
    assert extract(["plan", *options(root, "--probe", "0")]) == 0
    assert note in capsys.readouterr().out
    assert extract(["doctor", *options(root)]) == 0
    assert (
        "6 notes: clips that cannot be compared, because they were imported or an earlier version stored them"
        in capsys.readouterr().out
    )
    assert train(["fit", *options(root)]) == 0
    assert note in capsys.readouterr().out
    assert features(["info", str(root / "store")]) == 0
    assert "unrecorded: 6" in capsys.readouterr().out


def test_store_written_by_different_machines_reports_them(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = describe_machine(torch.device("cpu"))
    assert open_store(root / "store").machines() == {here: 6}
    assert open_store(root / "store" / "text").machines() == {here: 2}
    capsys.readouterr()
    assert extract(["status", *options(root)]) == 0
    assert "machines of different kinds" not in capsys.readouterr().out
    encode_again(root, "c4")
    note = (
        "note: machines of different kinds computed these clips, so their last bits may differ:"
        f" 5 by {here}; 1 by another"
    )
    for command in ("status", "run"):
        assert extract([command, *options(root)]) == 0
        assert capsys.readouterr().out.count(note) == 1
    assert extract(["status", *options(root, "--json")]) == 0
    assert json.loads(capsys.readouterr().out)["machines"] == {here: 5, "another": 1}


def test_status_without_annotations_reports_stale_clips_as_unchecked(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "data")
    capsys.readouterr()
    assert extract(["status", *options(root)]) == 0
    assert "stale clips: not checked: the annotations cannot be read" in capsys.readouterr().out
    assert extract(["status", *options(root, "--json")]) == 0
    assert json.loads(capsys.readouterr().out)["stale"] is None


def encode_again(root: Path, name: str) -> None:
    """What `extract run --refresh` does to the row of one clip, without its decoders, which take seconds to start."""
    store = open_store(root / "store")
    (clip,) = (clip for clip in load_dataset(config_of(root).data).clips if clip.clip_id == name)
    (work,) = store.missing_shards(replace=[name])
    row = {array: tensor[0] + 1 for array, tensor in store.read([name]).tensors().items()}
    origin = origin_of(clip, root / "data", clip.video.stat().st_size)
    store.write_shard(
        work.shard, {name: row}, store.sources([name]), {}, {name: origin}, work.replaces, {name: "another"}
    )


def errors(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.slow
def test_run_is_not_resumed_or_evaluated_after_its_clips_were_reencoded(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(["fit", *options(root)]) == 0
    assert train(["fit", *options(root, "--run.dir", str(root / "blind"), "--head.name", "question-only")]) == 0
    change(root, lambda clips: clips[4].update(start_s=0.25))  # of a clip of test, on which nothing was trained
    encode_again(root, "c4")
    assert train(["evaluate", *options(root)]) == 0
    move(root)
    assert train(["report", *options(root, "--run.table", str(root))]) == 0
    page = (root / "report.html").read_text()
    assert "1 clip is stale: c1 (stretch is 0.5 s to 1.5 s now" in page
    assert "encoded again or removed" not in page

    encode_again(root, "c1")
    capsys.readouterr()
    refusal = f"{root / 'run'}: 1 clip of {root / 'store'} was encoded again or removed after this run had been "
    for command in ("evaluate", "fit"):
        assert train([command, *options(root)]) == 1
        said = errors(capsys)
        assert refusal in said
        assert "'c1'; train again in another folder (egopatch train fit --config configs/demo/egovlpv2.yaml " in said
    assert train(["report", *options(root, "--run.table", str(root))]) == 0
    page = (root / "report.html").read_text()
    assert f"{root / 'run'}: 1 clip was encoded again or removed" in page
    assert "stale: c" not in page
    capsys.readouterr()

    (root / "run" / "test.json").unlink()  # as if it had been interrupted
    assert train(["fit", *options(root)]) == 1
    assert refusal in errors(capsys)
    for folder, head in (("anew", "egovlp"), ("blind", "question-only")):
        assert train(["fit", *options(root, "--run.dir", str(root / folder), "--head.name", head)]) == 0


def test_run_from_an_earlier_version_can_still_be_evaluated(root: Path) -> None:
    assert train(["fit", *options(root)]) == 0
    (root / "run" / "clips.json").unlink()
    move(root)
    encode_again(root, "c1")
    assert train(["evaluate", *options(root)]) == 0


def test_a_sweep_does_not_mix_runs_from_before_and_after_a_refresh(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["sweep", *options(root, "--head.name", "pooled", "--run.table", str(root / "runs")), "--name", "s"]
    assert train([*sweep, "--seeds", "0"]) == 0
    move(root)
    encode_again(root, "c1")
    capsys.readouterr()
    assert train([*sweep, "--seeds", "0", "1"]) == 1
    assert "or a sweep with another --name" in errors(capsys)


def same_rows(root: Path, other: str) -> None:
    """Check that the store equals one that a job writes from scratch with the current annotations."""
    assert extract(["run", *options(root, "--store.path", str(root / other))]) == 0
    refreshed, anew = open_store(root / "store"), open_store(root / other)
    assert refreshed.origins() == anew.origins()
    for name, tensor in anew.read(sorted(ALL)).tensors().items():
        assert torch.equal(refreshed.read(sorted(ALL)).tensors()[name], tensor), name


@pytest.mark.slow
def test_two_jobs_can_refresh_one_store_concurrently(root: Path) -> None:
    another_set(root)
    change(root, lambda clips: clips.pop())  # the clip that has no row yet
    job = start_job(options(root, "--refresh", "--wait", "--engine.workers", "2"))
    assert extract(["run", *options(root, "--refresh", "--wait")]) == 0
    out, error = job.communicate(timeout=300)
    assert job.returncode == 0, error
    assert "6/6 clips" in out
    assert features(["verify", str(root / "store")]) == 0
    same_rows(root, "anew")


@pytest.mark.slow
def test_refresh_waits_for_a_held_shard_and_encodes_the_rest(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    move(root)  # c1, in shard 0
    change(root, lambda clips: clips[2].update(start_s=0.25))  # c2, in shard 1
    with ExitStack() as held:
        held.enter_context(file_lease.hold(root / "store", 0))
        monkeypatch.setattr(run_module, "time", SimpleNamespace(sleep=lambda _: held.close(), monotonic=lambda: 0.0))
        assert extract(["run", *options(root, "--refresh", "--wait")]) == 0
    out = capsys.readouterr().out
    assert "waiting for 1 clip in shards that other processes hold" in out
    assert "this run encoded 2 clips" in out
    same_rows(root, "anew")
