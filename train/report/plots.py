"""The report's figures. Each function takes plain data and returns a Matplotlib figure; `save` writes it.

Colours are Okabe and Ito's and a brown, which colour-blind readers can tell apart. Every system has its own marker.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from egopatch.features.io.files import replacing
from egopatch.train.report.sources import Sweep, SweepPoint, TrainingLog
from egopatch.train.rundir.results import Results

# system: (colour, marker)
STYLES = {
    "majority": ("#9a9a9a", "v"),
    "question-only": ("#4d4d4d", "s"),
    "egovlp": ("#e69f00", "^"),
    "egovlpv2": ("#009e73", "D"),
    "mfas": ("#cc79a7", "<"),
    "psa": ("#0072b2", "o"),
    "pooled": ("#56b4e9", "p"),
    "attention": ("#f0e442", "*"),
    "attention (lite)": ("#a6761d", "P"),
    "pooled (lite)": ("#8c564b", "h"),
    "psa (lite)": ("#d55e00", "d"),
}
OTHER_STYLE = ("#000000", "X")
_CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK, _FAINT = "#1f2328", "#d8dce1"
_LOSS_POINTS = 120


def style(system: str) -> tuple[str, str]:
    """Colour and marker of a system, the same in every figure."""
    return STYLES.get(system, OTHER_STYLE)


def draw_table(results: Results) -> Figure:
    """Test accuracy over all questions: one panel per split, one row per system, one dot per seed."""
    figure, axes = _panels(len(results.splits), 4.6, 0.9 + 0.36 * max(len(results.split(s)) for s in results.splits))
    for axis, split in zip(axes, results.splits):
        rows = [(row, mean) for row in results.split(split) if (mean := row.mean("all")) is not None]
        for y, (row, mean) in enumerate(rows):
            colour, marker = style(row.system)
            axis.barh(y, mean, height=0.58, color=colour, alpha=0.9 if row.system == "psa" else 0.55)
            if len(row.runs) > 1:
                values = row.values("all")
                axis.plot(values, [y] * len(values), marker, color=_INK, markersize=3, linestyle="none")
            axis.annotate(
                f"{mean:.2f}", (max(row.values("all")), y), (4, 0), textcoords="offset points", va="center", size=8
            )
        axis.set_yticks(range(len(rows)), [row.label for row, _ in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, max((mean for _, mean in rows), default=1) * 1.18)
        axis.set_xlabel("accuracy, all test questions (%)")
        axis.set_title(split)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
    return figure


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
            if any(point.interval or point.sd is not None for point in curve):
                low, high = zip(*map(_band, curve))
                axis.fill_between(ratios, low, high, color=colour, alpha=0.18, linewidth=0)
            means = [point.mean for point in curve]
            axis.plot(ratios, means, "o-", color=colour, label=label, markersize=5, linewidth=1.8)
        for system, accuracy in references.get(split, {}).items():
            colour, _ = style(system)
            axis.axhline(accuracy, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=system)
        axis.set_xscale("log", base=2)  # ratios are usually doubled
        ticks = sorted({point.ratio for sweep, setting in lines for point in sweep.curve(setting)})
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
    figure, (axis,) = _panels(1, 6.4, 0.9 + 0.32 * len(points))
    for y, point in enumerate(points):
        low, high = _band(point)
        axis.plot([low, high], [y, y], color=_CYCLE[0], linewidth=5, alpha=0.3, solid_capstyle="butt")
        axis.plot(point.mean, y, "o", color=_CYCLE[0], markersize=5)
        axis.annotate(f"{point.mean:.2f}", (high, y), (4, 0), textcoords="offset points", va="center", size=8)
    axis.set_yticks(range(len(points)), [point.setting or f"ratio {point.ratio:g}" for point in points])
    axis.invert_yaxis()
    axis.margins(x=0.12, y=0.15)
    axis.set_xlabel("accuracy, all test questions (%)")
    axis.set_title(f"{sweep.system}, {sweep.split}")
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    return figure


def draw_curves(logs: Mapping[str, Mapping[str, TrainingLog]]) -> Figure:
    """Training loss against steps and val accuracy against epochs, one row per split.

    Args:
        logs: Logs by split, then system.
    """
    figure = Figure(figsize=(9.2, 3.0 * len(logs) + 0.2), layout="constrained", dpi=160)
    grid = figure.subplots(len(logs), 2, squeeze=False)
    for (left, right), (split, systems) in zip(grid, logs.items()):
        for axis in (left, right):
            _dress(axis)
        for system, log in systems.items():
            colour, marker = style(system)
            if log.steps:
                steps, losses = thin(log.steps, log.losses)
                left.plot(steps, losses, color=colour, linewidth=1.5, label=system)
            if log.epochs:
                shown = {"marker": marker, "markersize": 4} if len(log.epochs) <= 40 else {}
                right.plot(log.epochs, log.val, color=colour, linewidth=1.5, label=system, **shown)
        left.set(xlabel="step", ylabel="training loss", title=f"{split}: training loss")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.set(xlabel="epoch", ylabel="accuracy, all val questions (%)", title=f"{split}: accuracy on val")
    _legend(figure, figure.axes)
    return figure


def draw_selection(maps: Mapping[str, NDArray[np.float64]], ratios: Mapping[str, float]) -> Figure:
    """How often each patch is kept, one panel per split.

    Args:
        maps: Share of frames in which each patch is kept, [rows, cols], by split.
        ratios: Share that a random selection would keep, by split; marked on the colour bar.
    """
    figure, axes = _panels(len(maps), 4.6, 3.6)
    top = 100 * max((float(share.max()) for share in maps.values()), default=0.01)
    for axis, (split, share) in zip(axes, maps.items()):
        image = axis.imshow(100 * share, cmap="cividis", vmin=0, vmax=top)
        axis.set(title=split, xticks=[], yticks=[])
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axis, shrink=0.86)
        bar.outline.set_visible(False)
        bar.set_label("kept in % of frames", color=_INK, fontsize=8.5)
        bar.ax.tick_params(labelsize=8, color="#8b949e", labelcolor=_INK)
        bar.ax.axhline(100 * ratios[split], color="#ffffff", linewidth=3)
        bar.ax.axhline(100 * ratios[split], color="#d55e00", linewidth=1.5)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as PNG without a date or a version, so that equal data give equal bytes."""
    with replacing(path) as new:
        figure.savefig(new, format="png", metadata={"Software": None})
    return path


def thin(xs: Sequence[int], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most 120 points, each the mean of a stretch of equal length."""
    if len(xs) <= _LOSS_POINTS:
        return list(map(float, xs)), list(ys)
    stretches = np.array_split(np.arange(len(xs)), _LOSS_POINTS)
    x, y = np.asarray(xs, dtype=float), np.asarray(ys)
    return [float(x[s].mean()) for s in stretches], [float(y[s].mean()) for s in stretches]


def _band(point: SweepPoint) -> tuple[float, float]:
    return point.interval or (min(point.accuracies), max(point.accuracies))


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, height), layout="constrained", dpi=160)
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        _dress(axis)
    return figure, axes


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, below them, where it hides no line."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if found:
        figure.legend(
            list(found.values()),
            list(found),
            loc="outside lower center",
            ncols=min(len(found), 6),
            frameon=False,
            fontsize=8.5,
        )


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
