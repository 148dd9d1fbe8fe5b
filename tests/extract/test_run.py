"""`extract_together` looks up everything that its config names once and hands it on."""

import errno
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from egopatch.configs.packaged import packaged_config
from egopatch.extract.__main__ import main
from egopatch.extract.encoders import TextEncoder, find_network, input_transform, open_checkpoint
from egopatch.extract.fingerprints import video_fingerprint
from egopatch.extract.run import extract_together
from egopatch.extract.texts import encode_questions
from egopatch.extract.worker.device import device_of
from egopatch.extract.worker.job import resolve_job
from egopatch.features import StoreError, StoreSpec, open_store
from egopatch.features.io.fields import Record
from egopatch.features.state.header import create_header
from egopatch.features.storage.interface import Storage
from egopatch.features.store import create
from egopatch.features.store.text_substore import TEXT_FOLDER
from egopatch.features.tools.repair import repair
from egopatch.features.tools.verify import verify
from tests.extract.job import CLIPS, config_of, options
from tests.extract.video.videos import write_video


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["", TEXT_FOLDER])
def test_a_store_whose_creation_was_interrupted_is_planned_for_and_completed(
    folder: str, bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = bare / "store", create_header

    def full(storage: Storage, record: Record) -> None:
        if storage.location == store / folder:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(storage, record)

    with monkeypatch.context() as patch:
        patch.setattr(create, "create_header", full)
        assert main(["run", *options(bare)]) == 1
    assert "no space left while creating" in capsys.readouterr().err
    (store / folder / "ledger.jsonl.head").unlink()  # as if the disk had been full a moment earlier
    with pytest.raises(StoreError, match=r"^no store at \S+ \(store.json is missing\); run `extract run` to"):
        repair(store)
    assert main(["plan", *options(bare)]) == 0
    assert main(["run", *options(bare)]) == 0
    assert verify(store).ok
    assert (len(open_store(store).clip_ids), bool(open_store(store / TEXT_FOLDER).clip_ids)) == (CLIPS, True)


@pytest.mark.slow
def test_run_resolves_each_config_entry_once(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def count(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return counted

    looked_up = (find_network, device_of, open_checkpoint, input_transform, video_fingerprint, resolve_job)
    for function in looked_up:
        for name, module in list(sys.modules.items()):  # every module that imported it by name
            if name.startswith("egopatch.") and vars(module).get(function.__name__) is function:
                monkeypatch.setattr(module, function.__name__, count(function))
    monkeypatch.setattr(StoreSpec, "for_patches", count(StoreSpec.for_patches))
    assert extract_together([config_of(bare)])[0].clips == CLIPS
    assert calls == dict.fromkeys([*(function.__name__ for function in looked_up), "for_patches"], 1)


def test_truncated_questions_are_reported(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(fresh / "store" / TEXT_FOLDER)
    assert main(["run", *options(fresh, "--text.max_length", "4")]) == 0
    assert (
        "question texts have 4 tokens (text.max_length) or more; only the first 4 are read" in capsys.readouterr().out
    )


def test_more_frames_than_the_checkpoint_has_positions_for_are_reported(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(bare)
    job = resolve_job(config)
    trained = job.encoder.trained_frames
    assert trained is not None
    assert job.frames_line is None
    more = resolve_job(replace(config, video=replace(config.video, frames=4 * trained)))
    assert more.frames_line == (
        f"{config.encoder.checkpoint} has positions for {trained} frames, but video.frames is {4 * trained}: the "
        "positions of the other frames are filled in as its authors do; "
        f"--video.frames {trained} uses only those of the file"
    )
    # Reported before any data is read.
    changed = options(bare, "--video.frames", str(4 * trained))
    assert main(["run", *changed, "--data.root", "nowhere"]) == 2
    assert capsys.readouterr().out == f"note: {more.frames_line}\n"
    for command in (["plan", "--probe", "0"], ["doctor"]):
        assert main([*command, *changed, "--json"]) == 0
        assert more.frames_line in json.loads(capsys.readouterr().out)["advice"]


def test_clips_that_end_later_than_their_videos_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "a.mp4", frames=35)  # 2.3 s
    ends = {"whole": None, "within": 2.0, "rounded": 3.0, "beyond": 7.5}
    clips = [json.dumps({"clip_id": name, "video": "a.mp4", "end_s": end}) + "\n" for name, end in ends.items()]
    (tmp_path / "clips.jsonl").write_text("".join(clips))
    job = ["run", "--config", str(packaged_config("own_videos_lite")), "--data.root", str(tmp_path)]
    job += ["--data.questions", "null", "--store.path", str(tmp_path / "store"), "--engine.decoders", "1"]
    assert main([*job, "--video.frames", "2", "--video.size", "32", "--encoder.depth", "6", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["stores"][0]["cut_short"] == {"beyond": pytest.approx(5.2, abs=0.05)}
    out = printed.err
    assert "4/4 clips" in out
    note = "note: 1 clip ends later than its video, such as beyond by 5.2 s, and got frames up to the video's end; "
    assert f"\n{note}correct the annotations, or fetch the whole video\n" in out


def test_stored_questions_need_no_text_network(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for function in ("load_tokenizer", "load_text_encoder"):
        monkeypatch.delattr(f"egopatch.extract.texts.{function}")
    assert main(["run", *options(fresh)]) == 0
    assert capsys.readouterr().out.endswith("; this run encoded 0 clips, nothing is missing\n")
    # Nor if clips are missing; the tokenizer is still checked against that of the store.
    (fresh / "store" / "text").rename(fresh / "text")
    shutil.rmtree(fresh / "store")
    (fresh / "store").mkdir()
    (fresh / "text").rename(fresh / "store" / "text")
    assert main(["run", *options(fresh)]) == 0
    assert f"this run encoded {CLIPS} clips\n" in capsys.readouterr().out
    with (fresh / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write(" ")
    monkeypatch.undo()
    assert main(["run", *options(fresh)]) == 2
    assert "was created with different settings (tokenizer: store has" in capsys.readouterr().err


def test_more_text_tokens_than_the_network_has_positions_for_are_refused(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *options(bare, "--text.max_length", "600")]) == 2
    assert "text.max_length is 600, and the text network of " in capsys.readouterr().err
    assert not (bare / "store").exists()


@pytest.mark.parametrize("word", ["what", "the"])  # the first is also in the text by which the length is tried
def test_a_tokenizer_with_more_tokens_than_the_network_is_refused(
    word: str, bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bare / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = [token for token in vocabulary if token.lstrip("Ġ") == word]
    assert tokens
    vocabulary |= {token: 70000 + n for n, token in enumerate(tokens)}
    file.write_text(json.dumps(tokenizer))
    assert main(["run", *options(bare)]) == 2
    said = capsys.readouterr().err
    assert "whose tokenizer gives a text token 7000" in said
    assert "knows tokens 0 to " in said


def test_unreadable_tokenizer_leaves_no_store_behind(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bare / "tokenizer" / "tokenizer.json").write_text("{}")
    assert main(["run", *options(bare)]) == 2
    assert "whose tokenizer cannot be read" in capsys.readouterr().err
    assert not (bare / "store").exists()


@pytest.mark.slow
def test_encode_questions_matches_the_stored_rows(bare: Path) -> None:
    config = config_of(bare)
    extract_together([config])
    store = open_store(Path(config.store.path) / TEXT_FOLDER)
    text = store.clip_ids[0]
    fingerprint, rows = encode_questions(config, [text])
    assert fingerprint == store.fingerprint
    stored = store.read_text([text])
    assert torch.equal(rows[text]["states"], stored.states[0])
    assert torch.equal(rows[text]["attention_mask"], stored.attention_mask[0])


def test_questions_are_encoded_without_tf32(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As clips are: a container of NVIDIA's may want it in all products."""
    seen, config, forward = list[str](), config_of(bare), TextEncoder.forward

    def noted(self: TextEncoder, *inputs: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return forward(self, *inputs)

    monkeypatch.setattr(TextEncoder, "forward", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        encode_questions(config, ["who is there?"])
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["high", "highest"]  # the first only tries, on a CPU, how long a text may be


def test_the_gpu_memory_of_the_question_network_is_given_back(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several workers encode in other processes, which cannot use what torch keeps for later in this one."""
    networks, devices, init = list[TextEncoder](), list[str](), TextEncoder.__init__

    def noted(self: TextEncoder, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        networks.append(self)

    def empty_cache() -> None:
        devices.extend(parameter.device.type for parameter in networks[-1].parameters())

    def encode(*_: Any) -> None:
        assert set(devices) == {"meta"}
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TextEncoder, "__init__", noted)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr("egopatch.extract.run.encode_with_engine", encode)
    assert main(["run", *options(bare)]) == 1


# Kind of error, what a user should see of its text, and what follows that. CUDA cannot even start on a full GPU.
LACKING = (
    torch.OutOfMemoryError,
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 4.25 MiB is free",
    ". Including non-PyTorch memory, this process has 79.00 GiB memory in use.\nSee documentation",
)
FULL = (torch.AcceleratorError, "CUDA error: out of memory", "\nSearch for `cudaErrorMemoryAllocation' in ...\n")


@pytest.mark.parametrize(
    ("place", "failure", "batch", "remedy"),
    [
        ("run.encode_with_engine", LACKING, 4, "with encoder.batch 4; try --encoder.batch 2, or free"),
        ("run.encode_with_engine", LACKING, 1, "with encoder.batch 1; try a smaller --encoder.depth, or free"),
        ("run.encode_with_engine", FULL, 4, "with encoder.batch 4; try --encoder.batch 2, or free"),
        ("texts.full_float32", FULL, 4, "while questions were encoded; free"),
        ("encoders.TextEncoder.to", FULL, 4, "while questions were encoded; free"),
    ],
)
def test_a_gpu_without_enough_memory_is_reported_in_one_line(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    place: str, failure: tuple[type[Exception], str, str], batch: int, remedy: str,
) -> None:  # fmt: skip
    kind, said, more = failure

    def fail(*_: Any) -> None:
        raise kind(said + more)

    monkeypatch.setattr(f"egopatch.extract.{place}", fail)
    assert main(["run", *options(bare, "--encoder.batch", str(batch))]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "failed" in line)
    assert line.startswith(f"extract run: failed: {said}, {remedy}")


def test_plan_does_not_count_the_clips_of_a_store_without_header_as_missing(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fresh / "store" / "store.json").unlink()
    assert main(["plan", *options(fresh), "--probe", "0"]) == 1
    assert "store.json is missing, but the store has commits; run `egopatch features repair " in capsys.readouterr().err
    repair(fresh / "store")
    assert main(["plan", *options(fresh), "--probe", "0"]) == 0
    assert "20 stored, 0 in quarantine, 0 to do" in capsys.readouterr().out
