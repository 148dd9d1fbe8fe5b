"""What training and evaluation refuse: other settings, other features, damaged files."""

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from egopatch.configs.schema import Config, ConfigError
from egopatch.features import FingerprintMismatch, StoreError
from egopatch.features.tools.derive import derive
from egopatch.features.values.spec import keep_count
from egopatch.train.__main__ import main
from egopatch.train.fitting.experiment import pick_device
from egopatch.train.fitting.fit import evaluate, fit
from egopatch.train.rundir import lease, run_folder
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.sweeps.sweep import run_sweep
from tests.train.tiny import FIELDS, with_run, write_tiny


def test_a_refused_head_leaves_the_folder_to_the_corrected_one(tiny: Config, tmp_path: Path) -> None:
    derive(tiny.store.path, tmp_path / "small", keep=0.25)
    small = with_run(tiny, "psa", store_path=tmp_path / "small", train_epochs=1, head_coarse=False)
    for train in (fit, lambda config, command: run_sweep(config, seeds=[0], command=command)):
        with pytest.raises(ConfigError, match=r"head\.ratio 0\.5 with .* keeps 6 of 12 patches a frame"):
            train(with_run(small, "psa", head_ratio=0.5), "x")
        train(with_run(small, "psa", head_ratio=0.25), "x")
        # The folder of a run that was trained stays its own.
        with pytest.raises(ConfigError, match=r"holds a run with different settings"):
            train(with_run(small, "psa", head_ratio=0.25, train_epochs=2), "x")


def test_the_ratio_that_a_refusal_suggests_is_accepted(tiny: Config, tmp_path: Path) -> None:
    derive(tiny.store.path, tmp_path / "small", keep=0.4)
    small = with_run(tiny, "psa", store_path=tmp_path / "small", train_epochs=1, head_coarse=False)
    with pytest.raises(ConfigError, match=r"keeps 6 of 12 .* the store has 5; use a ratio of at most") as refused:
        fit(with_run(small, "psa", head_ratio=0.5), "x")
    suggested = float(re.findall(r"at most ([0-9.]+)", str(refused.value))[0])
    assert keep_count(suggested, 12) == 5
    fit(with_run(small, "psa", head_ratio=suggested), "x")


def test_an_unwritable_run_folder_names_its_option_and_the_cause(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running as root, which may write everywhere, the tests have no folder that is refused."""
    for flags, cause in (
        (0, r"\(Permission denied: .*/leases\); give this user permission"),
        (os.ST_RDONLY, r"\(Read-only file system: .*/leases\); mount its file system for writing"),
    ):
        with monkeypatch.context() as patch:
            mounted = SimpleNamespace(f_flag=flags)
            refusing = {"access": lambda path, mode: False, "statvfs": lambda path, mounted=mounted: mounted}
            patch.setattr(lease, "os", SimpleNamespace(**vars(os) | refusing))
            with pytest.raises(ConfigError, match=rf"/psa cannot be written {cause}, or set another --run\.dir$"):
                fit(tiny, "x")
            with pytest.raises(ConfigError, match=rf"/ratio-0\.5 cannot be written {cause}, .* --run\.dir$"):
                run_sweep(tiny, ratios=[0.5])
            tabled = with_run(tiny, "psa", run_table=tmp_path / "table")
            with pytest.raises(ConfigError, match=rf"{cause}, or set another --run\.table$"):
                run_sweep(tabled, ratios=[0.5])
    (tmp_path / "file").write_text("")
    below = with_run(tiny, "psa", run_dir=tmp_path / "file" / "psa")
    message = r"/file/psa cannot be written \(Not a directory: .*\); set another --run\.dir$"
    with pytest.raises(ConfigError, match=message):
        fit(below, "x")
    message = r"/sweeps/direct-psa/crews cannot be written .* set another --run\.dir$"
    with pytest.raises(ConfigError, match=message):
        run_sweep(below, ratios=[0.5])
    message = r"/sweeps/direct-psa/crews cannot be written .* set another --run\.table$"
    with pytest.raises(ConfigError, match=message):
        run_sweep(with_run(tiny, "psa", run_table=tmp_path / "file"), ratios=[0.5])


def test_a_run_folder_with_different_settings_is_refused(tiny: Config) -> None:
    fit(tiny, "x")
    with pytest.raises(ConfigError, match=r"with different settings \(head.ratio: folder has 0.5, requested 0.25\)"):
        fit(with_run(tiny, "psa", head_ratio=0.25), "x")


def test_a_store_as_the_run_folder_is_refused(tiny: Config) -> None:
    before = sorted(tiny.store.path.iterdir())
    in_store = dataclasses.replace(tiny, run=dataclasses.replace(tiny.run, dir=tiny.store.path))
    with pytest.raises(ConfigError, match=r"run.dir is .*, which is a store; expected a folder of its own for the run"):
        fit(in_store, "x")
    assert sorted(tiny.store.path.iterdir()) == before


def test_an_option_missing_from_an_older_run_takes_its_default(tiny: Config) -> None:
    run_folder.claim(tiny.run.dir, tiny)
    path = tiny.run.dir / run_folder.CONFIG
    settings = yaml.safe_load(path.read_text())
    del settings["train"]["contrast"]
    path.write_text(yaml.safe_dump(settings))
    run_folder.require_same_settings(tiny.run.dir, tiny)
    settings["data"]["paraphrases"] = True
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"settings \(train.contrast: folder has 0.0, requested 0.5\)"):
        run_folder.require_same_settings(tiny.run.dir, with_run(tiny, "psa", data_paraphrases=True, train_contrast=0.5))


def test_a_store_of_another_fingerprint_is_refused(tiny: Config, tmp_path: Path) -> None:
    fit(tiny, "x")
    other = write_tiny(tmp_path / "other", fields={**FIELDS, "checkpoint": "another"})
    message = r"psa was trained on features that differ from store .*other/store \(different: checkpoint\);"
    with pytest.raises(FingerprintMismatch, match=message):
        evaluate(with_run(tiny, "psa", store_path=other.store.path))


def test_a_config_that_disagrees_with_the_store_is_refused(tiny: Config) -> None:
    with pytest.raises(FingerprintMismatch, match="depth: store has 6, requested 12"):
        fit(with_run(tiny, "psa", encoder_depth=12), "x")
    with pytest.raises(ConfigError, match=r"^encoder.arch is 'light'; expected one of .*; did you mean lite\?$"):
        fit(with_run(tiny, "psa", encoder_arch="light"), "x")


@pytest.mark.parametrize("device", ["mps", "gpu0"])
def test_an_unsupported_train_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.device is '{device}'; expected auto, cpu, cuda, or cuda:N"):
        pick_device(device)


@pytest.mark.parametrize("content", [b"", b"head: [", b"\xff\xfe", b"- head\n", b"head: psa\n"])
def test_a_damaged_run_config_gives_a_one_line_error(tiny: Config, content: bytes) -> None:
    tiny.run.dir.mkdir(parents=True)
    (tiny.run.dir / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^.*/config\.yaml (is damaged|does not hold) .*; use another --run\.dir.*$"):
        fit(tiny, "x")


def test_the_config_of_a_moved_run_names_its_new_folder(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved" / "psa"
    fit(dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, epochs=1)), "x")
    moved.parent.mkdir()
    tiny.run.dir.rename(moved)
    evaluation = ["evaluate", "--config", str(moved / "config.yaml")]
    assert main(evaluation) == 1
    assert capsys.readouterr().err == (
        f"train evaluate: failed: run.dir is {tiny.run.dir}, where no head was trained, but one was in the folder of "
        f"{moved / 'config.yaml'}, which was perhaps moved; add --run.dir {moved}\n"
    )
    assert main([*evaluation, "--run.dir", str(moved)]) == 0


def test_damaged_and_missing_run_files_are_named(tiny: Config) -> None:
    with pytest.raises(RunError, match=r"card\.json: no such file; train the head first"):
        evaluate(tiny)
    fit(tiny, "x")
    with pytest.raises(RunError, match=r"holds a psa head but head\.name is 'egovlp'"):
        evaluate(with_run(tiny, "psa", head_name="egovlp"))
    (tiny.run.dir / "test.json").unlink()
    torch.save({"place": [0, 1]}, tiny.run.dir / "last.pt")
    with pytest.raises(RunError, match=r"last\.pt is damaged \('origin'\); delete it to train from the start"):
        fit(tiny, "x")
    (tiny.run.dir / "last.pt").write_bytes(b"cut off")
    with pytest.raises(RunError, match=r"last\.pt is damaged .*; delete it to train from the start"):
        fit(tiny, "x")
    (tiny.run.dir / "best.safetensors").unlink()
    with pytest.raises(RunError, match=r"best\.safetensors: no such file"):
        evaluate(tiny)


def test_clips_that_were_never_encoded_are_refused(tiny: Config, tmp_path: Path) -> None:
    more = write_tiny(tmp_path / "more", clips=60)
    message = r"12 of 60 requested clips are missing from .*; run `egopatch extract run .*` to encode"
    with pytest.raises(StoreError, match=message):
        fit(with_run(tiny, "x", data_root=more.data.root), "x")
