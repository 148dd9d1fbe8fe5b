"""Questions about videos of your own: what is refused before anything is encoded, and the cache."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.worker import job as worker_job
from egopatch.features import Fingerprint, FingerprintMismatch, open_store
from egopatch.train import predict
from egopatch.train.asking import ask as asking
from egopatch.train.asking.videos import cache_key, encode_video
from egopatch.train.fitting.fit import fit
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.run_folder import RunError
from tests.train.tiny import with_run


def test_a_multiple_choice_head_is_refused_before_encoding_a_video(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_run(tiny, "choice", train_epochs=1)
    fit(config, "x")
    card = Card.read(config.run.dir)
    dataclasses.replace(card, answers=card.answers[:0]).write(config.run.dir)
    monkeypatch.setattr(asking, "encode_video", lambda *_: pytest.fail("encoded for nothing"))
    with pytest.raises(ConfigError, match="whose head chooses among options; expected one with an answer vocabulary"):
        asking.ask_video(config, tmp_path / "a.mp4", "what?", None, tmp_path, 5)
    with pytest.raises(ConfigError, match="whose head chooses among options; expected one with an answer vocabulary"):
        predict(open_store(config.store.path), "clip|P0|0|1", "what?", config.run.dir)


def test_a_head_on_imported_features_refuses_a_video(trained: Config, tmp_path: Path) -> None:
    card = dataclasses.replace(Card.read(trained.run.dir), fingerprint={"arch": "imported", "origin": "imported"})
    with pytest.raises(RunError, match=r"trained on imported features, .*; import the video's features, and ask with"):
        encode_video(tmp_path, trained, card, None, tmp_path)


def test_a_cache_that_cannot_be_made_is_named_with_its_option(trained: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "a.mp4").touch()
    card = dataclasses.replace(Card.read(trained.run.dir), fingerprint={"arch": "lite"})
    with pytest.raises(ConfigError, match=r"/file/c cannot be written \(.*\); set another --cache"):
        encode_video(tmp_path, trained, card, None, tmp_path / "file" / "c")


def test_a_video_is_not_encoded_with_an_updated_encoder(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features would stay in the cache, and be refused even once the encoder is as it was."""
    (tmp_path / "a.mp4").touch()
    card = dataclasses.replace(Card.read(trained.run.dir), fingerprint={"arch": "colours", "plugin": "colours 1.2"})
    updated = SimpleNamespace(fingerprint=Fingerprint({"arch": "colours", "plugin": "colours 1.3"}))
    monkeypatch.setattr(worker_job, "resolve_job", lambda _: updated)
    said = r"plugin: head has 'colours 1.2', here 'colours 1.3'\); restore the package or checkpoint"
    with pytest.raises(FingerprintMismatch, match=said):
        encode_video(tmp_path / "a.mp4", trained, card, None, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_head_of_a_derived_store_is_refused_before_a_video_is_encoded(trained: Config, tmp_path: Path) -> None:
    card = Card.read(trained.run.dir)
    assert card.fingerprint is not None
    card = dataclasses.replace(card, fingerprint={**card.fingerprint, "derived_keep": 0.5})
    with pytest.raises(
        RunError, match=r"trained on a derived store, .*; use a head that was trained on a full store, or ask with"
    ):
        encode_video(tmp_path, trained, card, None, tmp_path)


def test_a_broken_symlink_is_part_of_the_cache_key(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    before = cache_key(tmp_path, {}, None)
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    linked = cache_key(tmp_path, {}, None)
    (tmp_path / "nowhere.mp4").touch()
    assert len({before, linked, cache_key(tmp_path, {}, None)}) == 3
