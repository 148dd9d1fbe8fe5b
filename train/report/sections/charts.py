"""The page's charts as inline SVG, which scales with the page and takes its colours from the style sheet.

A colour is the number of a class `k0`, `k1`, ..., which has a light and a dark value. Lines differ in their dashes too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

COLOURS = 12
# In units of the drawing: one is a pixel if the chart is 400 pixels wide.
WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 44
BAR = 26
# Letters of a bar's label; longer labels are shortened in the middle, since settings differ at the end.
LABEL_LETTERS = 26
MOST_TICKS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3")
LEVEL_DASHES = ("5 4", "1 4", "12 4", "6 3 1 3")


@dataclass(frozen=True)
class Line:
    """A line with its points, and the band around it if there is one.

    Attributes:
        colour: Number of its colour.
        xs: Rising.
        band: Lower and upper edge at each of `xs`.
        level: Whether it is a reference level: dashed, without points, across the whole chart.
    """

    label: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    level: bool = False

    @property
    def dashes(self) -> str:
        """Pattern of its dashes."""
        # Levels stand side by side, often with neighbouring colours.
        return LEVEL_DASHES[self.colour % 4] if self.level else DASHES[self.colour // 3 % len(DASHES)]


@dataclass(frozen=True)
class Bar:
    """A bar with its interval, and a dot for each of several seeds."""

    label: str
    colour: int
    value: float
    interval: tuple[float, float] | None
    dots: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """A drawing with its title, and the lines that its legend names."""

    title: str
    svg: Markup
    lines: tuple[Line, ...] = ()


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, ticks: Sequence[float] | None = None
) -> Chart:
    """Lines over a common axis.

    Args:
        ticks: Positions of the labels on the horizontal axis, which is then logarithmic; without them it is linear.
    """
    place = math.log2 if ticks else float
    xs = [x for line in lines if not line.level for x in line.xs] or [0.0, 1.0]
    bands = [edge for line in lines if line.band for edges in line.band for edge in edges]
    ys = [y for line in lines for y in line.ys] + bands
    x_low, x_high = place(min(xs)), place(max(xs))
    y_ticks = _ticks(*_widened(min(ys), max(ys)))
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def across(x: float) -> str:
        share = (place(x) - x_low) / ((x_high - x_low) or 1)
        return f"{LEFT + share * (WIDTH - LEFT - RIGHT):.1f}"

    def down(y: float) -> str:
        share = (y - y_low) / ((y_high - y_low) or 1)
        return f"{HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP):.1f}"

    def path(points: Iterable[tuple[float, float]]) -> str:
        return "L".join(f"{across(x)} {down(y)}" for x, y in points)

    parts = [_axis_y(y, down(y)) for y in y_ticks]
    x_ticks = list(ticks) if ticks else _ticks(min(xs), max(xs), whole=all(x == int(x) for x in xs))
    shown = [x for x in x_ticks if min(xs) <= x <= max(xs)]
    parts += [_axis_text(f"{x:g}", across(x), HEIGHT - BOTTOM + 17) for x in shown]
    for line in lines:
        colour = Markup("k{}").format(line.colour % COLOURS)
        if line.band:
            low, high = line.band
            edge = [*zip(line.xs, high), *reversed([*zip(line.xs, low)])]
            parts.append(Markup('<path class="band {}" d="M{}z"/>').format(colour, path(edge)))
        ends = (min(xs), max(xs))
        points = [(x, line.ys[0]) for x in ends] if line.level else [*zip(line.xs, line.ys)]
        parts.append(
            Markup('<path class="line {}" d="M{}" stroke-dasharray="{}"><title>{}</title></path>').format(
                colour, path(points), line.dashes or "none", line.label
            )
        )
        if not line.level and len(line.xs) <= 40:
            for x, y in points:
                parts.append(
                    Markup(
                        '<circle class="{}" cx="{}" cy="{}" r="3.5"><title>{}: {:.2f} at {:g}</title></circle>'
                    ).format(colour, across(x), down(y), line.label, y, x)
                )
    parts.append(_x_label(x_label, HEIGHT))
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(
        Markup('<text class="label" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            middle, y_label
        )
    )
    return Chart(title, _svg(f"{title}: {y_label} against {x_label}", HEIGHT, parts), tuple(lines))


def bar_chart(title: str, bars: Sequence[Bar], x_label: str) -> Chart:
    """Horizontal bars from zero, each with its label, value and interval."""
    height = BAR * len(bars) + 40
    left = 30 + 6.3 * max((min(len(bar.label), LABEL_LETTERS) for bar in bars), default=0)
    high = max((end for bar in bars for end in (bar.value, *(bar.interval or ()), *bar.dots)), default=0.0) or 1.0
    ticks = [tick for tick in _ticks(0, high) if tick <= high * 1.001]

    def at(value: float) -> float:
        return left + value / high * (WIDTH - left - 48)

    base = height - 34
    parts = [
        Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1}"/>').format(at(tick), base)
        for tick in ticks
    ]
    parts += [_axis_text(f"{tick:g}", f"{at(tick):.1f}", base + 14) for tick in ticks]
    for number, bar in enumerate(bars):
        y, colour = BAR * number + BAR / 2, bar.colour % COLOURS
        label, half = bar.label, LABEL_LETTERS // 2
        if len(label) > LABEL_LETTERS:
            label = f"{label[: half - 1]}…{label[-half:]}"
        parts.append(
            Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="end">{}<title>{}</title></text>').format(
                left - 6, y + 4, label, bar.label
            )
        )
        parts.append(
            Markup('<rect class="bar k{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="15"/>').format(
                colour, left, y - 7.5, at(bar.value) - left
            )
        )
        if bar.interval:
            parts.append(
                Markup('<path class="whisker" d="M{0:.1f} {2}H{1:.1f}M{0:.1f} {3}v8M{1:.1f} {3}v8"/>').format(
                    *map(at, bar.interval), y, y - 4
                )
            )
        parts += [Markup('<circle class="dot" cx="{:.1f}" cy="{}" r="2.2"/>').format(at(dot), y) for dot in bar.dots]
        end = max([bar.value, *(bar.interval or ()), *bar.dots])
        parts.append(
            Markup('<text class="value" x="{:.1f}" y="{:.1f}">{:.2f}</text>').format(at(end) + 5, y + 4, bar.value)
        )
    parts.append(_x_label(x_label, height))
    values = "; ".join(f"{bar.label} {bar.value:.2f}" for bar in bars)
    return Chart(title, _svg(f"{title}: {values}", height, parts))


def heat_map(title: str, share: NDArray[np.float64], chance: float) -> Chart:
    """Map of how often each patch is kept.

    Args:
        share: [rows, cols] share of frames in which a patch is kept.
        chance: Share that a random selection would keep, marked on the scale.
    """
    rows, cols = share.shape
    side = 300 / max(rows, cols)
    high = max(float(share.max()), chance) or 1.0
    height = side * rows + 44
    parts = [
        Markup('<rect class="heat" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" fill-opacity="{:.3f}">'
               "<title>row {}, column {}: {:.1f}%</title></rect>").format(
            50 + side * col, side * row, side, side, share[row, col] / high, row + 1, col + 1, 100 * share[row, col]
        )
        for row in range(rows)
        for col in range(cols)
    ]  # fmt: skip
    parts.append(
        Markup('<rect class="frame-edge" x="50" y="0.5" width="{:.1f}" height="{:.1f}"/>').format(
            side * cols, side * rows
        )
    )
    y = side * rows + 12
    steps = 30
    parts += [
        Markup('<rect class="heat" x="{:.1f}" y="{:.1f}" width="10.2" height="10" fill-opacity="{:.3f}"/>').format(
            50 + 10 * step, y, (step + 0.5) / steps
        )
        for step in range(steps)
    ]
    mark = 50 + 300 * chance / high
    parts.append(Markup('<path class="mark" d="M{:.1f} {:.1f}v16"/>').format(mark, y - 3))
    parts += [
        Markup('<text x="{}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y + 26, anchor, text)
        for x, anchor, text in ((50, "start", "0%"), (350, "end", f"{100 * high:.0f}% of frames"))
    ]
    return Chart(title, _svg(f"{title}: how often each of {rows} × {cols} patches is kept", height, parts))


def _svg(label: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, label, Markup("").join(parts)
    )


def _axis_y(value: float, y: str) -> Markup:
    return Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>'
        '<text x="{}" y="{y}" dy="4" text-anchor="end">{:g}</text>'
    ).format(LEFT, WIDTH - RIGHT, LEFT - 6, value, y=y)


def _axis_text(text: str, x: str, y: float) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(x, y, text)


def _x_label(text: str, height: float) -> Markup:
    return Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        (WIDTH + LEFT - RIGHT) / 2, height - 6, text
    )


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range, which begins lower if it is narrower than a fiftieth of its values: a flat curve should look flat."""
    least = max(abs(low), abs(high)) / 50 or 1.0
    low = min(low, max(high - least, min(low, 0.0)))
    return low, max(high, low + least)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers that cover the range from `low` to `high`, about `MOST_TICKS` of them; whole ones if `whole`."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= MOST_TICKS)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
