"""`train ask`: the answers of a trained head to one question, equal to those that evaluation gives."""

import dataclasses
import json
import re
import resource
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets.records import UNKNOWN_ANSWERS
from egopatch.features import Fingerprint, FingerprintMismatch, create_store, open_store
from egopatch.train import predict
from egopatch.train.__main__ import main
from egopatch.train.asking.ask import ask_clips
from egopatch.train.asking.choose import best_run
from egopatch.train.fitting.experiment import open_experiment
from egopatch.train.fitting.fit import fit
from egopatch.train.fitting.predict import Prediction
from egopatch.train.report import kept_picture
from egopatch.train.report.kept_picture import draw_prediction, mark_kept
from egopatch.train.report.table import is_synthetic
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.run_folder import RunError
from tests.features.conftest import FINGERPRINT, SPEC
from tests.features.faults import limited
from tests.train.fake_runs import write_run
from tests.train.tiny import with_run, write_tiny


def ask(config: Config, clip_id: str, question: str, answers: int = 5) -> Prediction:
    return predict(open_store(config.store.path), clip_id, question, config.run.dir, answers)


@pytest.mark.slow
def test_answers_and_kept_patches_match_the_evaluation(trained: Config) -> None:
    folder = trained.run.dir
    predicted = {line["question_id"]: line["answer"] for line in _lines(folder / "predictions.jsonl")}
    questions = open_experiment(trained).encoded["test"].questions[:6]
    with np.load(folder / "selection.npz") as saved:
        kept = dict(zip(saved["question_ids"].tolist(), saved["kept"].tolist(), strict=True))
    for question in questions:
        prediction = ask(trained, question.clip_id, question.text, answers=99)
        assert prediction.answers[0][0] == predicted[question.question_id]
        assert [list(frame) for frame in prediction.kept] == kept[question.question_id]
        shares = [share for _, share in prediction.answers]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.0001  # the two unknown answers have the rest
        assert prediction.unknown_words == ()


def test_the_best_run_on_the_stores_features_answers_by_default(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (question, *_) = open_experiment(trained).encoded["test"].questions
    asked = question.clip_id, question.text
    expected = ask(trained, *asked)
    store = open_store(trained.store.path.absolute())
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(RunError, match="runs holds no trained head that reads video and was trained on the features"):
        predict(store, *asked)
    shutil.copytree(trained.run.dir, here / "runs" / "mine")
    assert predict(store, *asked) == expected


def _lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_new_question_is_encoded_with_the_stores_network(trained: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = open_experiment(trained)
    clip_id, known = experiment.encoded["test"].questions[0].clip_id, experiment.encoded["test"].questions[0].text
    assert experiment.text_fingerprint is not None
    states = ask(trained, clip_id, known).answers
    fields = [experiment.text_fingerprint]

    def encode(config: Config, texts: list[str]) -> tuple[Fingerprint, dict[str, dict[str, torch.Tensor]]]:
        from egopatch.train.fitting.experiment import open_features

        read = open_features(config, "text", None).read_text([known])
        return fields[0], {texts[0]: {"states": read.states[0], "attention_mask": read.attention_mask[0]}}

    monkeypatch.setattr("egopatch.extract.texts.encode_questions", encode)
    prediction = ask(trained, clip_id, f"Zebra? {known}")
    assert prediction.answers == states
    assert prediction.unknown_words == ("zebra",)
    fields[0] = Fingerprint({**fields[0].fields, "depth": 99})
    with pytest.raises(
        FingerprintMismatch, match=r"text network is not the one that the head in .* \(depth: head has 6, config"
    ):
        ask(trained, clip_id, f"Zebra? {known}")


def test_a_possibly_truncated_question_gets_a_note(trained: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    clip_id, _ = asked = "clip|P0|0|1", "what colour is the left thing?"
    assert not ask(trained, *asked).cut
    fields = open_experiment(trained).text_fingerprint
    full = {"states": torch.randn(8, 32), "attention_mask": torch.ones(8, dtype=torch.bool)}
    monkeypatch.setattr("egopatch.extract.texts.encode_questions", lambda _, texts: (fields, {texts[0]: full}))
    found = ask_clips(trained, clip_id, "what colour is the thing on the left of the thing?", answers=1)
    assert found.predictions[0].cut
    note = "the question reaches the limit (text.max_length), so its end may be cut off: ask a shorter one"
    assert note in found.notes


def test_ask_command_prints_answers_and_suggests_close_clip_ids(
    trained: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    question = open_experiment(trained).encoded["test"].questions[0]
    ask = ["ask", "--config", str(trained.run.dir / "config.yaml"), "--clip", question.clip_id, question.text]
    assert main(ask) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].strip().partition("%")[2].strip()
    assert any(": kept 6 of 12 patches" in line for line in out)
    assert main([*ask, "--json", "--answers", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["answers"]) == 2
    every = ask_clips(trained, question.clip_id, question.text, answers=99).predictions[0].answers
    assert {answer for answer, _ in every} == set(Card.read(trained.run.dir).answers) - set(UNKNOWN_ANSWERS)
    assert shown["grid"] == [3, 4]
    assert main([*ask[:3], "--clip", question.clip_id[:-1], question.text]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"clip {question.clip_id[:-1]!r} is not in store" in line
    assert "; did you mean 'clip|" in line


def test_ask_without_a_clip_ranks_every_clip_of_the_store(trained: Config, capsys: pytest.CaptureFixture[str]) -> None:
    question = open_experiment(trained).encoded["test"].questions[0].text
    names = open_store(trained.store.path).clip_ids
    asked = ask_clips(trained, None, question, answers=1)
    assert {one.clip_id for one in asked.predictions} == set(names)
    shares = [one.answers[0][1] for one in asked.predictions]
    assert shares == sorted(shares, reverse=True)
    for one in asked.predictions[:2]:
        alone = ask(trained, one.clip_id, question, answers=1)
        assert alone.kept == one.kept
        assert alone.answers[0][1] == pytest.approx(one.answers[0][1], abs=1e-5)
    assert main(["ask", "--run", str(trained.run.dir), question, "--top", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [clip["clip_id"] for clip in shown["clips"]] == [one.clip_id for one in asked.predictions[:2]]
    assert shown["run"] == str(trained.run.dir)


def test_a_store_without_clips_is_refused(trained: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = open_store(trained.store.path)
    names = tuple(full.clip_ids)
    empty = create_store(tmp_path / "empty", full.spec, full.fingerprint, names).path
    failed = write_tiny(tmp_path / "failed", bad=names).store.path
    quarantined = f"clip {names[0]!r} is in quarantine: no video stream"
    for store, clip, code, message in (
        (empty, [], 1, "has no clips; run `egopatch extract run {}` to encode some"),
        (empty, ["--clip", names[0]], 1, "has no clips; run `egopatch extract run {}` to encode some"),
        (failed, [], 1, "no video stream; run `egopatch extract retry {}` to try them again"),
        (failed, ["--clip", names[0]], 2, quarantined),
    ):
        experiment = ["--config", str(trained.run.dir / "config.yaml"), "--store.path", str(store)]
        assert main(["ask", *experiment, "--run", str(trained.run.dir), "what is this?", *clip]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(message.format(shlex.join(experiment)))


def test_arguments_of_predict_that_are_not_text_are_refused(tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, ())
    wrong: dict[str, Any] = {"clip_id": ["clip"], "question": None, "answers": "3"}
    for name, value in wrong.items():
        with pytest.raises(TypeError, match=f"^{name} is {re.escape(repr(value))}; expected "):
            predict(store, **({"clip_id": "clip", "question": "what?"} | {name: value}))


def test_paths_in_place_of_a_store_or_an_experiment_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^store is 'runs/store'; expected an open store: open_store\(path\)$"):
        predict("runs/store", "clip", "what?")  # type: ignore[arg-type]
    for call in (kept_picture.clip_frames, fit):
        with pytest.raises(TypeError, match=r"^config is 'x\.yaml'; expected an experiment: load_config\(path\)$"):
            call("x.yaml", "clip")  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"^clip_id is \['clip'\]; expected the id of one clip"):
        kept_picture.clip_frames(Config(), ["clip"])  # type: ignore[arg-type]


def test_predict_names_its_own_arguments(trained: Config) -> None:
    with pytest.raises(ConfigError, match="question is empty; expected a question, such as"):
        ask(trained, open_store(trained.store.path).clip_ids[0], " ")
    with pytest.raises(ConfigError, match=r"^answers is -1; expected a number of at least 1"):
        ask(trained, "clip|P", "what is this?", -1)
    with pytest.raises(ConfigError, match=r"^clip 'clip\|P' is not in store .*; did you mean 'clip\|"):
        ask(trained, "clip|P", "what is this?")


def test_best_run_picks_the_best_val_head_with_real_weights(tmp_path: Path) -> None:
    def write(name: str, val: float, **more: Any) -> Path:
        folder = write_run(
            tmp_path / "runs", name, val=val, card={"answers": ["cup", "jar"]} | more.pop("card", {}), **more
        )
        (folder / "config.yaml").touch()
        return folder

    standin = {"encoder": {"checkpoint": "weights/egovlpv2-random.pth"}}
    write("random", 90, config=standin)
    best = write("best", 60)
    write("worse", 50, config={"head": {"width": 8}})
    write("blind", 95, model="question-only")
    other = write("other", 99, split="indirect")
    write("choice", 97, config={"head": {"width": 16}}, card={"answers": ["<UNK0>", "<UNK1>"]})
    write("foreign", 96, model="a-head-of-a-package-that-is-not-installed")
    unfinished = write("unfinished", 98, config={"head": {"width": 32}})
    (unfinished / "best.safetensors").unlink()
    folders = [tmp_path / "none", tmp_path / "runs"]
    assert best_run(folders, split="direct") == best
    assert best_run(folders) == other
    assert best_run(folders, "direct", Fingerprint({"depth": 6, "frames": 4})) == best
    with pytest.raises(RunError, match=r"and was trained on the features of this store; .*`egopatch demo --small"):
        best_run(folders, "direct", Fingerprint({"depth": 1}))
    for folder in (best, tmp_path / "runs" / "random", tmp_path / "runs" / "worse"):
        (folder / "best.safetensors").unlink()
    with pytest.raises(RunError, match=r"/runs holds only heads that choose among options, such as .*/choice;"):
        best_run(folders, split="direct")


def test_a_head_whose_package_is_not_installed_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs", "gated", model="gated", card={"answers": ["cup"]})
    (folder / "config.yaml").touch()
    with pytest.raises(
        RunError, match=r"and can be used here; .* is .*/runs/gated \(head.name is 'gated'; expected one"
    ):
        best_run([tmp_path / "runs"])


def test_ask_usage_errors_print_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no head was trained
    for args, code, expected in (
        ([], 2, "neither --video nor --config is given"),
        (["--video", "a.mp4", "--clip", "b"], 2, "--video and --clip are both given"),
        (["--video"], 2, "--video has no value"),
        (["--video="], 2, "--video is empty; expected a value"),
        (["--video", "a.mp4", "--run", ""], 2, "--run is empty; expected a value"),
        (["--video", "--json"], 2, "--video has no value"),
        (
            ["--video", "a.mp4", "--video=b.mp4"],
            2,
            "--video is given twice; give it once: --video also takes a folder of videos",
        ),
        (["--run", "a", "--video", "a.mp4", "--run", "b"], 2, "--run is given twice"),
        (
            ["--video", "a.mp4"],
            1,
            "runs/demo or runs/demo-small holds no trained head that reads video; train one with",
        ),
        (["--video", "a.mp4", "--run", "none"], 1, "run folder none holds no config.yaml"),
        (["--video", "a.mp4", "--picture", "a.txt"], 2, "--picture is a.txt; expected a name that ends in .jpg"),
    ):
        assert main(["ask", "what?", *args]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
    assert main(["ask", " ", "--video", "a.mp4"]) == 2
    assert "QUESTION is empty; expected a question in quotes" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["ask", "--video", "a.mp4", "what?", "who?"])
    assert "unrecognized arguments: who?; expected one QUESTION at a time, in quotes" in capsys.readouterr().err
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main(["ask", option])
        lines = capsys.readouterr().out.splitlines()
        assert "  --video FILE          a video file, or a folder of videos; each is encoded only once" in lines
        assert any(line.startswith("  --run DIR ") for line in lines)
    for wrong, meant in (("--vidoe", "--video"), ("--rnu", "--run")):
        with pytest.raises(SystemExit, match="2"):
            main(["ask", "what?", wrong, "a"])
        assert capsys.readouterr().err.endswith(f"unrecognized arguments: {wrong} a; did you mean {meant}?\n")


def test_a_head_trained_on_synthetic_videos_is_marked_in_any_folder(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny.data.root, tmp_path / "data")
    (tmp_path / "data" / "events.jsonl").touch()
    config = with_run(tiny, "majority", head_name="majority", train_epochs=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=Path("data")))
    monkeypatch.chdir(tmp_path)
    fit(config, "x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert is_synthetic(dataclasses.asdict(Card.read(config.run.dir)))
    # A card of an earlier version, for which only the data set's own folder can tell.
    earlier = json.loads((config.run.dir / "card.json").read_text())
    del earlier["synthetic"]
    (config.run.dir / "card.json").write_text(json.dumps(earlier))
    assert not is_synthetic(dataclasses.asdict(Card.read(config.run.dir)))
    monkeypatch.chdir(tmp_path)
    assert is_synthetic(dataclasses.asdict(Card.read(config.run.dir)))


def test_heads_without_video_and_untrained_runs_cannot_be_asked(tiny: Config) -> None:
    config = with_run(tiny, "majority", head_name="majority", train_epochs=1)
    fit(config, "x")
    with pytest.raises(ConfigError, match="holds a majority head; expected one that reads video"):
        ask(config, "clip|P0|0|1", "what?")
    blank = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=config.run.dir / "none"))
    with pytest.raises(ValueError, match=r"expected the run\.dir of a trained head"):
        ask(blank, "clip|P0|0|1", "what?")


def test_a_full_disk_leaves_the_picture_that_was_there(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32)
    monkeypatch.setattr(kept_picture, "clip_frames", lambda *_: frames)
    prediction = Prediction("clip", "what?", (("cup", 1.0),), (0,), (0.5,), (), (2, 2), (), cut=False)
    for name, form in (("a.jpg", "JPEG"), ("b.PNG", "PNG")):
        file = tmp_path / "pictures" / name
        draw_prediction(file, prediction, tiny)
        before = file.read_bytes()
        with Image.open(file) as image:
            assert image.format == form
        with limited(resource.RLIMIT_FSIZE, 100), pytest.raises(OSError, match="File too large") as caught:
            draw_prediction(file, prediction, tiny)
        assert caught.value.filename == str(file)
        assert file.read_bytes() == before
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {"a.jpg", "b.PNG"}


def test_kept_patches_are_outlined_and_the_others_dimmed() -> None:
    marked = mark_kept(np.ones((3, 16, 16), np.float32), [1], grid=(1, 2))
    assert np.allclose(marked[:, :, :8], 0.35)
    assert np.allclose(marked[:, 2:14, 10:14], 1)  # inside
    assert np.allclose(marked[:, 0, 8], np.array([255, 214, 0]) / 255)
