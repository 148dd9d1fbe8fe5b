"""The commands of stage one, end to end, on twenty synthetic clips and a random-weight network."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from egopatch.extract.__main__ import COMMANDS, main
from egopatch.extract.commands.again import retry_command
from egopatch.extract.datasets import load_dataset
from egopatch.extract.planning.plan import Plan
from egopatch.extract.video.indexing.cache import VideoCache
from egopatch.extract.worker.job import resolve_job
from egopatch.extract.worker.job_stats import jobs_path
from egopatch.features import open_store
from tests.extract.job import CLIPS, config_of, options, videos
from tests.json_keys import documented_keys


def test_store_holds_the_output_of_the_encoder(made: Path) -> None:
    from tests.extract.feed.prepared import prepare_clip

    config = config_of(made)
    dataset = load_dataset(config.data)
    store = open_store(config.store.path)
    assert store.clip_ids == tuple(clip.clip_id for clip in dataset.clips)
    encoder = resolve_job(config).encoder
    for clip in (dataset.clips[0], dataset.clips[-1]):
        prepared = prepare_clip(clip, config.video, VideoCache())
        expected = encoder(torch.from_numpy(prepared.frames)[None])
        stored = store.read([clip.clip_id])
        # Batches of another size may round differently in the last bit before float16.
        torch.testing.assert_close(stored.patches, expected.patches.half(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(stored.saliency, expected.saliency, rtol=1e-4, atol=1e-4)
        assert stored.timestamps is not None
        assert stored.timestamps[0].tolist() == prepared.timestamps.tolist()
    texts = open_store(Path(config.store.path) / "text").read_text(dataset.texts)
    assert texts.states.shape == (len(dataset.texts), 30, 128)


def test_retry_command_keeps_only_the_options_of_the_experiment() -> None:
    args = ["--config", "a b.yaml", "--wait", "--shard", "0/2", "--store.path=s", "--video.frames", "2", "--json"]
    expected = "egopatch extract retry --config 'a b.yaml' --store.path=s --video.frames 2"
    assert retry_command(args) == expected
    assert retry_command(["--config=a.yaml"]) == "egopatch extract retry --config a.yaml"


def test_a_second_run_encodes_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *options(made)]) == 0
    assert "this run encoded 0 clips" in capsys.readouterr().out
    assert main(["run", *options(made, "--json")]) == 0
    shown = capsys.readouterr()
    (store,) = json.loads(shown.out)["stores"]
    assert (store["path"], store["clips"], store["encoded"]) == (str(made / "store"), CLIPS, 0)
    assert "this run encoded 0 clips" in shown.err


@pytest.mark.slow
def test_every_command_prints_its_documented_keys_in_json(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egopatch.extract.commands.inputs.synth.render", lambda *_, **__: None)  # it takes seconds
    config, video = options(made), videos(made)[0]
    shutil.copy(video, tmp_path / "a.mp4")
    (tmp_path / "clips.jsonl").write_text(json.dumps({"clip_id": "a", "video": "a.mp4"}))
    own = ["--data.name", "jsonl", "--data.root", str(tmp_path), "--data.questions", "null"]
    new = ["--encoder.checkpoint", str(tmp_path / "w.pth"), "--text.model", str(tmp_path / "tokenizer")]
    commands = {
        "plan": [*config, "--probe", "0"],
        "plan --clips": [*config, "--clips", "9", "--clips-per-second", "2"],
        "run": config,
        "retry": config,
        "status": config,
        "doctor": config,
        "transcode": [*config, *own, "--out", str(tmp_path / "copies")],
        "standin": [*config, *new],
        "frames": [str(video), "--out", str(tmp_path / "f.npz"), "--video.frames", "2"],
        "synth": ["--out", str(tmp_path / "synth"), "--clips", "20"],
        "checkpoint": ["inspect", str(made / "weights.pth")],
    }
    # The tests of these two are in test_provide.py and test_own_videos.py.
    assert {*commands, "data", "videos"} == {*COMMANDS, "plan --clips"}
    for command, args in commands.items():
        name = command.split()[0]
        assert main([name, *args, "--json"]) == 0, command
        result = json.loads(capsys.readouterr().out)
        expected = documented_keys("doctor" if name == "doctor" else f"extract {command}", also=name == "doctor")
        assert result.keys() == expected, command
        for store in result.get("stores", []):
            assert store.keys() == documented_keys("extract run", each=True)


def test_different_depth_is_refused_naming_both_values(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *options(made, "--encoder.depth", "1")]) == 2
    assert "depth: store has 2, requested 1" in capsys.readouterr().err
    assert main(["run", *options(made)]) == 0


def test_new_clips_are_added_and_old_rows_stay(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_store(fresh / "store")
    known = before.clip_ids
    tokens = before.read(known).patches
    shutil.rmtree(fresh / "data")
    assert main(["synth", "--out", str(fresh / "data"), "--clips", str(CLIPS + 3)]) == 0
    assert main(["run", *options(fresh)]) == 0
    assert "this run encoded 3 clips" in capsys.readouterr().out
    after = open_store(fresh / "store")
    assert after.clip_ids[:CLIPS] == known
    assert torch.equal(after.read(known).patches, tokens)


@pytest.mark.slow
def test_bad_videos_are_quarantined_and_retried(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(fresh / "store")
    absent, empty, cut = videos(fresh)[:3]
    kept = {path: path.read_bytes() for path in (absent, empty, cut)}
    absent.unlink()
    empty.write_bytes(b"")
    cut.write_bytes(kept[cut][: len(kept[cut]) // 2])
    assert main(["run", *options(fresh)]) == 0
    out = capsys.readouterr().out
    assert f"{CLIPS - 3}/{CLIPS} clips" in out
    for path, reason in [(absent, "does not exist"), (empty, "is empty"), (cut, "cannot be decoded")]:
        (line,) = (line for line in out.splitlines() if line.startswith(f"quarantined {path.stem}:"))
        assert reason in line
    assert f"then run `{retry_command(options(fresh))}`" in out

    assert main(["run", *options(fresh)]) == 0
    assert "this run encoded 0 clips" in capsys.readouterr().out  # quarantined clips wait for retry

    for path, content in kept.items():
        path.write_bytes(content)
    assert main(["retry", *options(fresh)]) == 0
    assert f"{CLIPS}/{CLIPS} clips" in capsys.readouterr().out
    assert not open_store(fresh / "store").quarantine


@pytest.mark.slow
def test_two_workers_write_the_same_store(fresh: Path) -> None:
    assert main(["run", *options(fresh, "--engine.workers", "2", "--store.path", str(fresh / "two"))]) == 0
    one, two = open_store(fresh / "store"), open_store(fresh / "two")
    assert one.clip_ids == two.clip_ids
    assert torch.equal(one.read(one.clip_ids).patches, two.read(two.clip_ids).patches)


@pytest.mark.slow
def test_plan_and_status_json_report_counts_and_sizes(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(fresh / "store")
    videos(fresh)[0].unlink()
    assert main(["plan", *options(fresh), "--json", "--probe", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["clips"], plan["todo"], plan["without_video"], plan["shards"]) == (CLIPS, CLIPS, 1, 4)
    row = 4 * 49 * 128 * 2 + 128 * 4 + 4 * 49 * 4 + 4 * 4
    assert plan["bytes_to_write"] == CLIPS * row
    assert plan["seconds_per_clip"] > 0
    main(["run", *options(fresh)])
    capsys.readouterr()
    assert main(["status", *options(fresh), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["committed"], status["quarantined"], status["missing"]) == (CLIPS - 1, 1, 0)


@pytest.mark.slow
def test_a_note_while_planning_stays_out_of_the_json(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_plan(*_: object) -> Plan:
        print("note: no CUDA graph can be made of the encoder")
        return Plan(1, 0, {}, 0, 0, 1, 0, 1, 1, 1, None, 0, None, None, {}, (), ())

    monkeypatch.setattr("egopatch.extract.planning.plan.make_plan", make_plan)
    assert main(["plan", *options(made, "--json")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["clips"] == 1
    assert "note: " in err


def test_plan_counts_what_is_missing_from_a_store(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten rows of two shards wait, five clips failed, and three new clips will be a shard of their own."""
    shutil.rmtree(fresh / "store")
    for video in videos(fresh)[:5]:
        video.rename(video.with_suffix(".away"))
    assert main(["run", *options(fresh, "--engine.max_errors", "5", "--shard", "0/2")]) == 0
    for video in videos(fresh)[:5]:
        video.rename(video.with_suffix(".mp4"))
    assert main(["synth", "--out", str(fresh / "more"), "--clips", str(CLIPS + 3)]) == 0
    capsys.readouterr()
    assert main(["plan", *options(fresh, "--data.root", str(fresh / "more")), "--json", "--probe", "0"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["clips"], plan["done"], plan["quarantined"]) == (CLIPS + 3, 5, 5)
    assert (plan["todo"], plan["shards"]) == (CLIPS + 3 - 10, 3)


@pytest.mark.parametrize(
    ("command", "said"),
    [("status", f"{CLIPS}/{CLIPS} clips committed"), ("transcode", f"{CLIPS} clips transcoded")],
)
def test_commands_that_encode_nothing_do_not_import_torch(command: str, said: str, made: Path, tmp_path: Path) -> None:
    """It takes two seconds to import, more than counting a million clips."""
    program = (
        "from egopatch.extract.__main__ import main; import sys; code = main(sys.argv[1:]); print(code, *sys.modules)"
    )
    out = ["--out", str(tmp_path)] if command == "transcode" else []
    line = [sys.executable, "-c", program, command, *options(made, *out)]
    *lines, modules = subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()
    assert said in "\n".join(lines)
    code, *names = modules.split()
    assert code == "0"
    assert not {"torch", "zarr", "h5py"} & set(names)


def test_doctor_reports_a_missing_video(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *options(fresh)]) in (0, 1)
    capsys.readouterr()
    videos(fresh)[0].unlink()
    for code, what in ((0, "stored clips whose video file is gone"), (1, "clips without a video file")):
        assert main(["doctor", *options(fresh), "--json"]) == code
        findings = json.loads(capsys.readouterr().out)["findings"]
        (finding,) = (f for f in findings if f["what"] == what)
        assert finding["count"] == 1
        shutil.rmtree(fresh / "store", ignore_errors=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data.root", "nowhere"], "nowhere"),
        (["--encoder.checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--encoder.arch", "egovlp"], "set encoder.arch to the network"),
        (["--video.size", "224"], "size is 224"),
        (["--encoder.device", "cuda"], "encoder.device is 'cuda'"),
        (["--text.model", "no/such/tokenizer"], "text.model is 'no/such/tokenizer'"),
    ],
)
def test_invalid_input_exits_with_code_2_and_one_line(
    change: list[str], message: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert main(["run", *options(made, *change)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert all(": no such file" in line for line in error.splitlines()[1:])  # one line per missing file


def test_standin_overwrites_only_another_standin(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real.pth"
    shutil.copy(made / "weights.pth", real)
    command = ["standin", *options(made, "--text.model", str(tmp_path / "tokenizer"))]
    assert main([*command, "--encoder.checkpoint", str(real)]) == 0
    content = torch.load(real, weights_only=True)
    content["state_dict"]["module.video_model.cls_token"] += 1
    torch.save(content, real)
    before = real.read_bytes()
    assert main([*command, "--encoder.checkpoint", str(real)]) == 2
    assert "which exists and is not a stand-in, so it is not replaced; name another path" in capsys.readouterr().err
    assert real.read_bytes() == before
    real.unlink()
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(json.dumps({"model": {"vocab": {str(piece): piece for piece in range(30_000)}}}))
    before = tokenizer.read_bytes()
    assert main([*command, "--encoder.checkpoint", str(real)]) == 2
    assert f"text.model is '{tokenizer.parent}', which exists and is not a stand-in" in capsys.readouterr().err
    assert (tokenizer.read_bytes(), real.exists()) == (before, False)


def test_a_standin_needs_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clips.jsonl").write_text('{"clip_id": "a", "video": "a.mp4"}\n')
    data = ["--data.name", "jsonl", "--data.root", str(tmp_path), "--data.questions", "null"]
    assert main(["standin", *data, "--encoder.checkpoint", str(tmp_path / "weights.pth")]) == 2
    assert "data.questions is null, but a stand-in's tokenizer is trained on questions" in capsys.readouterr().err


def test_unreachable_hub_leaves_no_files_behind(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    before = sorted(bare.rglob("*"))
    model = ("--text.model", "egopatch/no-such-tokenizer")
    assert main(["run", *options(bare, *model)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("extract run: error: text.model is 'egopatch/no-such-tokenizer'")
    assert error.count("\n") == 1
    assert sorted(bare.rglob("*")) == before
    assert main(["doctor", *options(bare, *model)]) == 1
    assert f"1 fault: tokenizer that cannot be loaded\n    text.model is {model[1]!r}" in capsys.readouterr().out


def test_unknown_or_missing_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu"]) == 2
    error = capsys.readouterr().err
    assert "unknown command 'rnu'; choose one of videos, plan, run, " in error
    assert error.endswith("; did you mean run?\n")
    assert main([]) == 2
    assert main(["--help"]) == 0


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
@pytest.mark.slow
def test_quantised_store_reports_its_reconstruction_error(
    fresh: Path, made: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(fresh / "store")
    assert main(["run", *options(fresh, "--store.dtype", dtype, "--store.codec", "zstd")]) == 0
    assert f"patches in {dtype}: reconstruction error " in capsys.readouterr().out
    store, whole = open_store(fresh / "store"), open_store(made / "store")
    assert 0 < store.reconstruction_error["patches"] < 0.05
    assert (store.spec.codec, store.fingerprint.fields["stored_dtype"]) == ("zstd", dtype)
    read = store.read(store.clip_ids, dtype=torch.float32).patches
    torch.testing.assert_close(read, whole.read(store.clip_ids).patches.float(), rtol=0.1, atol=0.05)
    texts = open_store(fresh / "store" / "text")
    assert texts.spec.array("states").dtype == "float16"
    assert texts.fingerprint == open_store(made / "store" / "text").fingerprint


def test_plan_counts_files_and_shards(made: Path, bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *options(bare), "--json", "--probe", "0"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["shards"], plan["todo"], plan["seconds_per_clip"]) == (4, CLIPS, None)
    store = open_store(made / "store")
    assert plan["files"] == sum(len(list((made / "store" / array.name).glob("c*"))) for array in store.spec.arrays)


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_without_cpu_support_prints_advice(
    supported: bool, bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("egopatch.extract.worker.device.has_bfloat16", lambda _: supported)
    bfloat16 = options(bare, "--encoder.dtype", "bfloat16", "--encoder.device", "cpu")
    for command in (["plan", *bfloat16, "--probe", "0"], ["doctor", *bfloat16], ["run", *bfloat16, "--shard", "9/10"]):
        main(command)
        advice = [line for line in capsys.readouterr().out.splitlines() if "--encoder.dtype float32" in line]
        assert len(advice) == (0 if supported else 1)
    main(["plan", *options(bare), "--probe", "0"])
    assert "--encoder.dtype" not in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_statistics_that_cannot_be_written_do_not_fail_a_finished_job(
    number: int, bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "store.jobs.jsonl")

    monkeypatch.setattr("egopatch.extract.run.record_job", refuse)
    assert main(["run", *options(bare)]) == 0
    note = f"note: store.jobs.jsonl: {os.strerror(number)}; no forecast knows the times"
    assert note in capsys.readouterr().out


def test_time_per_stage_is_printed_and_recorded(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *options(bare)]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("time: "))
    for wait in ("starting", "waiting for the encoder", "for decoders", "for the disk"):
        assert f"{wait} " in line
    for stage in ("decoding", "encoding", "writing"):
        assert f"{stage} " in line.partition("in parallel: ")[2]
    (job,) = map(json.loads, jobs_path(bare / "store").read_text().splitlines())
    assert job["committed"] == CLIPS
    stages = job["stages"]
    waits = stages["start_s"] + stages["wait_decode_s"] + stages["encode_s"] + stages["wait_write_s"]
    assert 0.5 * stages["total_s"] < waits <= stages["total_s"] * 1.01
    assert stages["decode_s"] > 0
    assert stages["write_s"] > 0
    assert ("bound by its start" in out) == (stages["start_s"] >= 0.5 * stages["total_s"])
    job["stages"]["start_s"] = job["stages"]["total_s"]
    jobs_path(bare / "store").write_text(json.dumps(job) + "\n")
    assert main(["status", *options(bare)]) == 0
    assert "the last job was bound by its start" in capsys.readouterr().out
