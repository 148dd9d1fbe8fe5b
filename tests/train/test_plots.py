"""Figures: the right numbers reach Matplotlib, and files are written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from egopatch.train.report import plots
from egopatch.train.report.sources import read_sweep
from egopatch.train.sweeps.sweep_results import _draw
from tests.train.fake_runs import write_sweep


def test_ratio_plot_has_the_mean_and_the_range_over_seeds(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, seeds=3) / "sweep.json")
    figure = plots.draw_ratio([sweep], {"direct": {"egovlp": 38.5}})
    (axis,) = figure.axes
    line, level = axis.lines
    np.testing.assert_allclose(line.get_xdata(), [0.1, 0.25, 1.0])
    np.testing.assert_allclose(line.get_ydata(), [42.0, 43.5, 51.0])  # 40 + 10 ratio, seeds 0, 1, 2
    np.testing.assert_allclose(level.get_ydata(), 38.5)
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    assert {tuple(corner) for corner in corners.tolist()} >= {(0.1, 41.0), (0.1, 43.0), (1.0, 50.0), (1.0, 52.0)}
    assert axis.get_title() == "direct"


def test_the_sweep_plot_titles_custom_data_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    _draw(write_sweep(tmp_path), "data/kitchen")
    assert drawn[0].axes[0].get_title() == "data/kitchen"


def test_a_single_seed_has_no_band(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, seeds=1) / "sweep.json")
    (axis,) = plots.draw_ratio([sweep], {}).axes
    assert not axis.collections


def test_each_grid_setting_is_a_separate_line(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, seeds=1) / "sweep.json"
    text = path.read_text().replace('"overrides": {}', '"overrides": {"head.scores": ["random"]}', 2)
    path.write_text(text)
    (axis,) = plots.draw_ratio([read_sweep(path)], {}).axes
    assert [line.get_label() for line in axis.lines] == ["psa, ratio_direct", "head.scores random"]
    assert [len(line.get_xdata()) for line in axis.lines] == [1, 2]


def test_a_legend_of_long_names_stays_within_the_picture(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, seeds=1) / "sweep.json"
    levels = {f"head.scores question + saliency + prior {number}": 40.0 + number for number in range(7)}
    figure = plots.draw_ratio([read_sweep(path)], {"direct": levels})
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert len(legend.get_texts()) == 8


def test_long_names_of_settings_leave_room_for_the_plot(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, seeds=1) / "sweep.json"
    content = json.loads(path.read_text())
    for member in content["members"]:
        parts = {"head.coarse": True, "head.scores": ["question", "saliency", "prior"], "train.lr": member["ratio"]}
        member |= {"overrides": parts | {"head.levels": ["patch", "frame", "video"]}, "ratio": 0.25}
    path.write_text(json.dumps(content))
    sweep = read_sweep(path)
    for figure in (plots.draw_settings(sweep), plots.draw_ratio([sweep], {})):
        figure.draw_without_rendering()
        (axis,) = figure.axes
        assert axis.get_window_extent().width > figure.bbox.width / 3
        texts = [*axis.get_yticklabels(), *(text for legend in figure.legends for text in legend.get_texts())]
        boxes = [text.get_window_extent() for text in texts]
        assert min(box.x0 for box in boxes) >= 0
        assert max(box.x1 for box in boxes) <= figure.bbox.width
        assert any("train.lr 0.1" in text.get_text().replace("\n", " ") for text in texts)


def test_tick_labels_of_close_ratios_do_not_overlap() -> None:
    assert plots.spaced({1.0, 0.1, 0.25, 0.5}) == [0.1, 0.25, 0.5, 1.0]
    assert plots.spaced([0.05, 0.1, 0.11, 0.12, 0.25, 0.97, 1.0]) == [0.05, 0.1, 0.25, 1.0]
    assert plots.spaced([0.25]) == [0.25]


def test_long_traces_are_averaged() -> None:
    steps, losses = plots.thin(range(1200), [float(step) for step in range(1200)])
    assert len(steps) == len(losses) == 120
    assert steps[0] == losses[0] == pytest.approx(4.5)
    assert plots.thin([1, 2], [3.0, 4.0]) == ([1.0, 2.0], [3.0, 4.0])


def test_saved_plots_are_pictures_and_repeat_bit_for_bit(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, seeds=3) / "sweep.json")

    def draw() -> Figure:
        return plots.draw_ratio([sweep], {})

    first, second = plots.save(draw(), tmp_path / "a.png"), plots.save(draw(), tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 10


HELP_AND_MATPLOTLIB = """
import contextlib
from egopatch.train.__main__ import main

with contextlib.suppress(SystemExit):
    main(["report", "--help"])
import matplotlib.figure
"""


def test_matplotlib_does_not_report_that_home_cannot_be_written() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP_AND_MATPLOTLIB], env={"HOME": "/proc/none"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
