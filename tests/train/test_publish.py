"""`train publish`: an upload is complete, its cards are accurate, and unknown licences are refused."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from egopatch.configs.schema import Config
from egopatch.features import Store, open_store
from egopatch.features.state.origin import Origin
from egopatch.features.state.quarantine import QuarantineRecord
from egopatch.features.tools.verify import verify
from egopatch.train.__main__ import main
from egopatch.train.publishing.cards import head_card
from egopatch.train.publishing.folders import _stated
from egopatch.train.publishing.origins import origins
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.results import read_run
from tests.train.fake_runs import write_run
from tests.train.tiny import FIELDS


@pytest.fixture
def run(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A finished run on the tiny store, with fake weights that are never loaded."""
    monkeypatch.setattr("egopatch.train.publishing.folders.load_weights", lambda *_: {})
    data = {"name": "jsonl", "root": str(tiny.data.root)}
    card = {"fingerprint": FIELDS, "text_fingerprint": FIELDS, "parameters": 12_345}
    encoder = {"arch": "egovlpv2", "checkpoint": "weights/EgoVLPv2.pth"}
    folder = write_run(tiny.run.dir.parent, "psa", config={"data": data, "encoder": encoder}, card=card)
    (folder / "config.yaml").write_text("head: {name: psa}\n")
    return dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, name="jsonl"))


def publish(config: Config, to: Path, *options: str) -> int:
    places = ["--store.path", str(config.store.path), "--run.dir", str(config.run.dir)]
    data = ["--data.name", config.data.name, "--data.root", str(config.data.root)]
    return main(["publish", "--to", str(to), *places, *data, *options])


def test_an_upload_is_complete(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "upload"
    assert publish(run, out, "--terms", "mine: CC BY 4.0") == 0
    assert "note: card.json and config.yaml name folders of this machine: data.root" in capsys.readouterr().out
    text = (out / "head" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["model-index"][0]["results"][0]["metrics"][2]["value"] == 50.0
    assert front["license"] == "other"
    assert "- data: jsonl. Terms: mine: CC BY 4.0" in text
    assert "- depth: `6`" in text
    named = {line.split("`")[1] for line in text.split("## Files")[1].splitlines() if line.startswith("- ")}
    assert named | {"README.md"} == {path.name for path in (out / "head").iterdir()}
    assert verify(out / "store" / "features").ok
    usage = Path(__file__).parents[2] / "docs" / "usage.md"
    assert "give `store.path` as `upload/store/features`" in " ".join(usage.read_text().split())
    copy, store = open_store(out / "store" / "features"), open_store(run.store.path)
    assert copy.clip_ids == store.clip_ids
    assert (out / "store" / "features" / "text").is_dir()
    card = (out / "store" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["size_categories"] == ["n<1K"]
    assert "48 of 48 stored" in card
    assert str(tmp_path) not in card
    # Publishing again replaces the cards and copies nothing twice.
    assert publish(run, out, "--terms", "mine: none") == 0
    assert "Terms: mine: none" in (out / "head" / "README.md").read_text()


def test_local_paths_in_the_command_are_noted(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = run.run.dir / "card.json"
    config, store = tmp_path / "my runs" / "a.yaml", tmp_path / "the store"
    options = ["--config", str(config), f"--store.path={store}", "--data.root", "../here/x"]
    note = "note: README.md and card.json quote the command, which names folders of this machine"
    for command, named in (
        (shlex.join(["egopatch", "train", "fit", *options]), f"{config}, {store}"),
        ("egopatch train fit --config '/a/b c", "/a/b"),  # as a manual edit may have left it
    ):
        card.write_text(json.dumps(json.loads(card.read_text()) | {"command": command}))
        assert publish(run, tmp_path / "upload", "--terms", "none", "--head-only") == 0
        assert f"{note}: {named}\n" in capsys.readouterr().out


def test_local_paths_in_the_store_are_noted(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = QuarantineRecord(f"video {tmp_path}/b.mp4 is empty (0 bytes); download it again", 1, "")
    monkeypatch.setattr(
        Store, "origins", lambda _: {"a": None, "b": Origin("b.mp4", 1), "c": Origin("/my disk/c.mp4", 1)}
    )
    monkeypatch.setattr(Store, "quarantine", {"d": reason})
    monkeypatch.setattr("egopatch.train.publishing.folders.convert", lambda *_: open_store(run.store.path))
    assert publish(run, tmp_path / "upload", "--terms", "none") == 0
    shown = capsys.readouterr().out
    assert "note: the store lists the paths of its videos on this machine, such as /my disk/c.mp4\n" in shown
    assert f"for quarantine, which name files of this machine, such as {tmp_path}/b.mp4\n" in shown


def test_an_unknown_licence_is_refused(run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(run, tmp_path / "upload") == 2
    assert capsys.readouterr().err == (
        "train publish: error: no licence is known for data: jsonl; find out whether you may publish what was made "
        "from it, then state the terms of each with a --terms 'NAME: LICENCE' of its own; NAME is any part of a name "
        "listed above\n"
    )
    assert not (tmp_path / "upload").exists()


@pytest.mark.parametrize(
    ("terms", "stated"),
    [
        ([], {"weights: w": "", "data: d": ""}),
        (["CC0"], {"weights: w": "CC0", "data: d": "CC0"}),
        (["w: MIT", "data: d: CC0"], {"weights: w": "MIT", "data: d": "CC0"}),
        (["data: see: the page"], {"weights: w": "", "data: d": "see: the page"}),
        (["other: MIT", "d: CC0"], {"weights: w": "other: MIT", "data: d": "CC0"}),
        (["data: ", " "], {"weights: w": "", "data: d": ""}),
    ],
)
def test_terms_apply_to_the_items_they_name(terms: list[str], stated: dict[str, str]) -> None:
    assert _stated(["weights: w", "data: d"], terms) == stated


def test_a_store_that_the_head_was_not_trained_on_is_refused(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.run.dir / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": FIELDS | {"depth": 7}}))
    assert publish(run, tmp_path / "upload", "--terms", "none") == 2
    assert "depth" in capsys.readouterr().err
    assert publish(run, tmp_path / "upload", "--terms", "none", "--head-only") == 0


def test_the_card_states_that_no_answers_are_published(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.run.dir / "test.json"
    unknown = {"accuracy": None, "n": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | dict.fromkeys(("open", "binary", "all"), unknown)))
    assert publish(run, tmp_path / "upload", "--terms", "none", "--head-only") == 0
    text = (tmp_path / "upload" / "head" / "README.md").read_text()
    assert "Accuracy on test in percent: unknown, because no answers are published. Epoch 3" in text
    path.write_text("{}")
    capsys.readouterr()
    assert publish(run, tmp_path / "upload", "--terms", "none", "--head-only") == 1
    assert "test.json is damaged (KeyError: 'open'); evaluate the run again" in capsys.readouterr().err


def test_egosynth_is_not_labelled_as_the_data_set_whose_layout_it_uses(tmp_path: Path) -> None:
    card = _card(tmp_path, config={"data": {"name": "egotaskqa", "root": "runs/egosynth"}})
    text = head_card(card, read_run(tmp_path / "run").scores, (), [])
    assert "name: EgoSynth" in text
    assert "egotaskqa" not in text.split("## Origin")[0]


def _card(folder: Path, config: dict[str, Any]) -> Card:
    return Card.read(write_run(folder, "run", config=config, card={"parameters": 1}))


def test_stand_in_weights_are_labelled_as_random(run: Config, tmp_path: Path) -> None:
    card = _card(tmp_path, config={"encoder": {"checkpoint": "w/egovlpv2-random.pth"}, "data": {"name": "jsonl"}})
    assert "RANDOM WEIGHTS" in origins(card)[0].what


@pytest.mark.parametrize(
    ("encoder", "video", "text", "expected"),
    [
        ({"arch": "lite"}, {"package": "made-up 1"}, {"text_checkpoint": "a"}, ["made-up 1", "text network: bert"]),
        ({"arch": "lite"}, {"package": "made-up 1"}, {"text_checkpoint": "a", "package": "made-up 1"}, ["made-up 1"]),
        ({"arch": "imported"}, {"origin": "imported"}, {"text_checkpoint": "a"}, ["imported", "text network: bert"]),
        ({"arch": "hf", "checkpoint": "w/dinov2"}, {"checkpoint": "a"}, {"checkpoint": "a"}, ["dinov2"]),
        ({"arch": "lite"}, None, {"text_checkpoint": "a"}, ["text network: bert"]),
    ],
)
def test_all_weights_are_named(
    tmp_path: Path, encoder: dict[str, Any], video: dict[str, Any] | None, text: dict[str, Any], expected: list[str]
) -> None:
    config = {"encoder": encoder, "text": {"model": "models/bert"}, "data": {"name": "nextqa"}}
    card = {"fingerprint": video, "text_fingerprint": text, "parameters": 1}
    *weights, data = origins(Card.read(write_run(tmp_path, "run", config=config, card=card)))
    assert data.what.startswith("data: nextqa, ")
    assert [one.terms for one in weights] == [None] * len(expected)
    for one, name in zip(weights, expected, strict=True):
        assert name in one.what


def test_the_checkpoint_a_head_started_from_is_named_as_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lock = {"egovlpv2/EgoVLPv2.pth": {"sha256": "b" * 64, "size": 1, "origin": "by hand"}}
    Path("data_sources.lock.json").write_text(json.dumps(lock))
    config: dict[str, Any] = {
        "encoder": {"arch": "egovlpv2", "checkpoint": "w/EgoVLPv2.pth"},
        "head": {"checkpoint": "w/tuned.pth"},
        "data": {"name": "nextqa"},
    }
    card = {"fingerprint": {"checkpoint": "b" * 64}, "text_fingerprint": {"checkpoint": "b" * 64}, "parameters": 1}
    encoder, head, _ = origins(Card.read(write_run(tmp_path, "a", config=config, card=card)))
    assert encoder.what.endswith("(SHA-256 as in data_sources.lock.json)")
    assert (head.what, head.terms) == ("head: tuned.pth", None)
    config["head"]["checkpoint"] = "other/EgoVLPv2.pth"
    _, head, _ = origins(Card.read(write_run(tmp_path, "b", config=config, card=card)))
    assert head.what.startswith("head: EgoVLPv2.pth")
    assert head.what.endswith("(not compared with a lock file)")


def test_cards_describe_the_training_settings_whatever_the_config_says(run: Config, tmp_path: Path) -> None:
    path = run.run.dir / "card.json"
    card = json.loads(path.read_text())
    card["config"]["encoder"]["checkpoint"] = "weights/my-own.pth"
    path.write_text(json.dumps(card))
    other = ["--encoder.checkpoint", "weights/EgoVLPv2.pth", "--data.name", "egotaskqa", "--head-only"]
    assert publish(run, tmp_path / "upload", "--terms", "mine", *other) == 0
    text = (tmp_path / "upload" / "head" / "README.md").read_text()
    assert "- encoder: my-own.pth. Terms: mine\n- data: jsonl. Terms: mine\n" in text


def test_a_published_file_is_compared_with_the_lock(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = ["--terms", "mine: none", "--head-only"]
    card = run.run.dir / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"fingerprint": {"checkpoint": "a" * 64}}))
    assert publish(run, tmp_path / "upload", *weights) == 0
    assert "MIT (its repository)" in (tmp_path / "upload" / "head" / "README.md").read_text()
    entry = {"sha256": "b" * 64, "size": 1, "origin": "by hand"}
    Path("data_sources.lock.json").write_text(json.dumps({"egovlpv2/EgoVLPv2.pth": entry}))
    assert publish(run, tmp_path / "upload", *weights) == 2
    assert "give the checkpoint another name" in capsys.readouterr().err
