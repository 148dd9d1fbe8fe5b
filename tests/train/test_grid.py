"""Sweep grids: each value is checked, and so is the whole config that it becomes part of."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from egopatch.configs.schema import Config, ConfigError
from egopatch.train.heads import Head
from egopatch.train.heads.registry import _PLUGINS as HEADS
from egopatch.train.sweeps import sweep
from egopatch.train.sweeps.axes import read_axes, typed_values
from egopatch.train.sweeps.sweep import run_sweep
from tests.train.tiny import with_run


@pytest.mark.parametrize(
    ("text", "values", "same"),
    [
        ("head.ratio: [0.5, 0.5]", r"\[0\.5, 0\.5\]", "0.5 and 0.5"),
        ("train.lr: [1e-3, 0.002, 0.001]", r"\['1e-3', 0\.002, 0\.001\]", r"'1e-3' and 0\.001"),
        ("head.ratio: [0.5, 1, 1.0]", r"\[0\.5, 1, 1\.0\]", r"1 and 1\.0"),
        ("head.coarse: [true, 'true']", r"\[True, 'true'\]", "True and 'true'"),
    ],
)
def test_equal_values_written_differently_are_refused_as_duplicates(
    tiny: Config, tmp_path: Path, text: str, values: str, same: str
) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(text)
    option = text.partition(":")[0]
    message = rf"in the sweep, {option} lists a value twice in {values}: {same} are the same; list each value once"
    with pytest.raises(ConfigError, match=message):
        run_sweep(tiny, grid=grid)


def test_a_list_as_a_key_is_refused_in_one_line(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("? [a]\n: [1]\n")
    with pytest.raises(ConfigError, match=r"--grid .*grid\.yaml: cannot be read \(.*unhashable key"):
        read_axes(None, None, grid)


def test_a_text_in_quotes_stays_a_text(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("head.options.x: ['on', 'null', '1', '010', 'a: b', on, null, 1, 1e-3, [1e-3, 'on']]")
    kept = ["on", "null", "1", "010", "a: b", True, None, 1, 0.001, ["1e-3", "on"]]
    (typed,) = typed_values(read_axes(None, None, grid)).values()
    assert repr(typed) == repr(kept)


def test_an_option_given_both_as_a_flag_and_in_the_grid_is_refused(tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("head.ratio: [0.25, 0.5]\ntrain.seed: [0, 1]\n")
    message = r"--ratios is \[1\.0\], but --grid .*grid\.yaml also has head\.ratio, as \[0\.25, 0\.5\]; give its"
    with pytest.raises(ConfigError, match=message):
        read_axes([1.0], None, grid)
    with pytest.raises(ConfigError, match=r"--seeds is \[3\], but --grid .* also has train\.seed, as \[0, 1\]; give"):
        read_axes(None, [3], grid)


@pytest.mark.parametrize(
    ("head", "ratios", "noted"),
    [
        ({"head_name": "question-only"}, [0.5, 1.0], "the head question-only does not depend on head.ratio, so runs"),
        ({"head_name": "mine"}, [0.5, 1.0], "the head mine does not depend on head.ratio, so runs that differ only in"),
        ({"head_scores": ("all",)}, [0.5, 1.0], "the head psa does not depend on head.ratio if head.scores is all,"),
        ({"head_name": "question-only"}, [0.5], None),
        ({}, [0.5, 1.0], None),
    ],
)
def test_sweeping_ratios_of_a_head_that_ignores_them_prints_a_note(
    tiny: Config,
    head: dict[str, object],
    ratios: list[float],
    noted: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(HEADS._registered, "mine", Head("mine", lambda _, sizes: torch.nn.Identity()))
    monkeypatch.setattr(sweep, "open_experiment", fail_fast)  # the note comes before anything is read
    with pytest.raises(InterruptedError):
        sweep.run_sweep(with_run(tiny, "noted", **head), ratios=ratios)
    out = capsys.readouterr().out
    assert (f"note: {noted}" in out) if noted else ("note: " not in out)


def fail_fast(_: Config) -> NoReturn:
    raise InterruptedError


@dataclass(frozen=True)
class _Mode:
    mode: str = "mean"


@pytest.mark.parametrize(
    ("first", "second", "folder"),
    [
        ("mean/all", "mean all", "mean_all"),
        ("ä", "ö", "_"),
        ("mean", "Mean", "Mean"),  # one folder on a Mac
    ],
)
def test_settings_that_would_share_a_folder_are_refused(
    first: str, second: str, folder: str, tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEADS._registered, "modal", Head("modal", lambda options, sizes: torch.nn.Identity(), _Mode))
    grid = tmp_path / "grid.yaml"
    grid.write_text(f'head.options.mode: ["{first}", "max", "{second}"]\n', encoding="utf-8")
    message = (
        rf"in the sweep, two settings would share the folder .*/modes/mode-{folder}_seed-0 \(head\.options\.mode "
        rf"'{first}' and '{second}'\); move one of the values to a sweep with another --name"
    )
    with pytest.raises(ConfigError, match=message):
        run_sweep(with_run(tiny, "modal", head_name="modal"), seeds=[0], grid=grid, name="modes")
    assert not (tiny.run.dir.parent / "sweeps").exists()


def test_a_grid_of_more_options_than_a_folder_name_has_room_for_is_refused(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEADS._registered, "modal", Head("modal", lambda options, sizes: torch.nn.Identity(), _Mode))
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"head.options.mode: [{'x' * 243}, {'x' * 244}]\n")
    message = (
        r"the folder mode-x+\.\.\. of 2 options would have a name of 256 characters; expected at most 255: .*--grid"
    )
    with pytest.raises(ConfigError, match=message):
        run_sweep(with_run(tiny, "modal", head_name="modal"), seeds=[0], grid=grid)
    assert not (tiny.run.dir.parent / "sweeps").exists()


def test_grid_values_are_checked_against_the_config_not_the_defaults(tiny: Config, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    config = replace(tiny, head=replace(tiny.head, width=36), train=replace(tiny.train, epochs=1))
    grid.write_text("head.heads: [3]")  # no divisor of the default width
    assert json.loads(run_sweep(config, grid=grid).read_text())["trained"] == 1
    grid.write_text("head.heads: [3, 5]")
    with pytest.raises(ConfigError, match=r"^in the sweep, head\.width is 36; expected .* of head\.heads, 5$"):
        run_sweep(config, grid=grid)


def test_a_grid_value_must_fit_the_rest_of_the_config(tiny: Config, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text("train.contrast: [0.3]")
    with pytest.raises(ConfigError, match=r"^train\.contrast is 0\.3, but data\.paraphrases is false"):
        run_sweep(tiny, grid=grid)
    tiny = replace(tiny, data=replace(tiny.data, paraphrases=True))
    assert json.loads(run_sweep(tiny, grid=grid).read_text())["trained"] == 1
