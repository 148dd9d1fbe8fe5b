"""The report's figures. Each function takes plain data and returns a Matplotlib figure; `save` writes it.

Lines have Okabe and Ito's colours, which colour-blind readers can tell apart.
"""

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from egopatch.features.io.files import replacing
from egopatch.train.report.sources import Sweep

# Colours of the levels in the picture of docs/egosynth.md, and of any other level.
COLOURS = {"question-only": "#4d4d4d", "pooled (lite)": "#8c564b"}
OTHER_COLOUR = "#000000"
_CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK, _FAINT = "#1f2328", "#d8dce1"
_LOSS_POINTS = 120
# Letters in a line: of a setting's name beside the axis, and per inch of a legend.
_LETTERS, _LETTERS_PER_INCH = 40, 10
# The smallest distance between two tick labels on a logarithmic axis, as a share of its length.
_APART = 0.09


def draw_ratio(sweeps: Sequence[Sweep], references: Mapping[str, Mapping[str, float]]) -> Figure:
    """Test accuracy against the selection ratio, mean over seeds: one panel per split.

    The band is the 95% interval over seeds and questions if the sweep has one, else the range of the seeds.

    Args:
        sweeps: Sweeps of one or both splits.
        references: Accuracy of each system drawn as a level line, by split.
    """
    splits = list(dict.fromkeys(sweep.split for sweep in sweeps))
    figure, axes = _panels(len(splits), 4.6, 3.3)
    for axis, split in zip(axes, splits):
        lines = [(s, setting) for s in sweeps if s.split == split for setting in s.settings]
        for index, (sweep, setting) in enumerate(lines):
            curve = sweep.curve(setting)
            ratios = [point.ratio for point in curve]
            colour = _CYCLE[index % len(_CYCLE)]
            label = setting or (sweep.system if len(lines) == 1 else f"{sweep.system}, {sweep.name}")
            low, high = zip(*(point.band for point in curve))
            if low != high:
                axis.fill_between(ratios, low, high, color=colour, alpha=0.18, linewidth=0)
            means = [point.mean for point in curve]
            axis.plot(ratios, means, "o-", color=colour, label=label, markersize=5, linewidth=1.8)
        for system, accuracy in references.get(split, {}).items():
            colour = COLOURS.get(system, OTHER_COLOUR)
            axis.axhline(accuracy, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=system)
        axis.set_xscale("log", base=2)  # ratios are usually doubled
        ticks = spaced({point.ratio for sweep, setting in lines for point in sweep.curve(setting)})
        axis.set_xticks(ticks, [f"{ratio:g}" for ratio in ticks])
        axis.minorticks_off()
        axis.set_xlabel("selection ratio: share of patches kept in each frame")
        axis.set_ylabel("accuracy, all test questions (%)")
        axis.set_title(split)
    _legend(figure, axes)
    return figure


def draw_settings(sweep: Sweep) -> Figure:
    """Test accuracy of each setting of a sweep: the mean over seeds with its band, best first."""
    points = sorted(sweep.points, key=lambda point: -point.mean)
    names = [textwrap.fill(point.setting or f"ratio {point.ratio:g}", _LETTERS) for point in points]
    lines = max(name.count("\n") for name in names) + 1
    figure, (axis,) = _panels(1, 6.4, 0.9 + (0.18 + 0.14 * lines) * len(points))
    for y, point in enumerate(points):
        low, high = point.band
        axis.plot([low, high], [y, y], color=_CYCLE[0], linewidth=5, alpha=0.3, solid_capstyle="butt")
        axis.plot(point.mean, y, "o", color=_CYCLE[0], markersize=5)
        axis.annotate(f"{point.mean:.2f}", (high, y), (4, 0), textcoords="offset points", va="center", size=8)
    axis.set_yticks(range(len(points)), names)
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.15)
    axis.set_xlabel("accuracy, all test questions (%)")
    axis.set_title(f"{sweep.system}, {sweep.split}")
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as PNG without a date or a version, so that equal data give equal bytes."""
    with replacing(path) as new:
        figure.savefig(new, format="png", metadata={"Software": None})
    return path


def spaced(ratios: Collection[float]) -> list[float]:
    """The ratios in rising order, without those whose label would touch the previous one; the last is always kept."""
    rising = sorted(ratios)
    kept: list[float] = []
    for ratio in rising:
        if kept and math.log2(ratio / kept[-1]) < _APART * math.log2(rising[-1] / rising[0]):
            if ratio != rising[-1]:
                continue
            kept.pop()
        kept.append(ratio)
    return kept


def thin(xs: Sequence[int], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most 120 points, each the mean of a stretch of equal length."""
    if len(xs) <= _LOSS_POINTS:
        return list(map(float, xs)), list(ys)
    stretches = np.array_split(np.arange(len(xs)), _LOSS_POINTS)
    x, y = np.asarray(xs, dtype=float), np.asarray(ys)
    return [float(x[s].mean()) for s in stretches], [float(y[s].mean()) for s in stretches]


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained", dpi=160)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        _dress(axis)
    return figure, axes


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend for all panels below them, where it hides no line, in as many columns as fit."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    names = [textwrap.fill(label, int(_LETTERS_PER_INCH * figure.get_figwidth())) for label in found]
    for columns in range(min(len(found), 6), 0, -1):
        legend = figure.legend(
            list(found.values()),
            names,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8.5,
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _dress(axis: Axes) -> None:
    axis.set_axisbelow(True)
    axis.grid(color=_FAINT, linewidth=0.7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#8b949e")
    axis.tick_params(color="#8b949e", labelcolor=_INK, labelsize=8)
    axis.xaxis.label.set(color=_INK, fontsize=8.5)
    axis.yaxis.label.set(color=_INK, fontsize=8.5)
    axis.title.set(color=_INK, fontsize=10)
