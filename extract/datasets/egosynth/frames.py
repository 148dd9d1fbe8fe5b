"""EgoSynth's pictures: a scene drawn frame by frame.

A picture shows a grey table below a wall of clutter, small coloured objects, the person's light hand from below and the
other person's dark hand from a side. The camera sways. An action can be recognised at the hand, within one or two
patches: a lifted object is larger and casts a shadow, a moved one is held between fingers, an opened one has its lid
beside it.

The hard setting has smaller objects, a hand that has not yet arrived at the object it will touch next, neutral pieces
on the table, and people behind it. Their hands look like the person's and handle things in the objects' colours; only
their position, and arms that come from above, distinguish them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from egopatch.extract.datasets.egosynth.scene import GRID, OBJECTS, TABLE_ROWS, Action, Scene, Thing, rng_of

Colour = tuple[int, int, int]

TABLE = (112, 122, 128)
WALL = (128, 130, 126)
SKIN = (244, 184, 142)
SLEEVE = (48, 70, 60)
OTHER_SKIN = (84, 46, 28)
OTHER_SLEEVE = (150, 150, 60)
LID = (250, 250, 250)
HOLE = (12, 12, 12)
SHADOW = (16, 18, 22)

# Height of the wall above the table, and width of an arm, in cells of the 7x7 grid.
WALL_ROWS = 1.6
LIMB_WIDTH = 0.45
# Range of heights of bystanders' hands, and the number of things that each of them handles, one after the other.
BYSTANDER_ROWS = (0.5, 1.1)
BYSTANDER_TOUCHES = 3
# From dark to light.
SLEEVE_SHADES = (30, 160)
PIECE_SHADES = (60, 200)


def frames(scene: Scene, count: int, size: int) -> Iterator[np.ndarray]:
    """The `count` frames of a clip, uint8 [size, size, 3] each."""
    rng, setting = rng_of(scene.seed, scene.index, 1), scene.setting
    margin = int(np.ceil(setting.sway * size / GRID)) + 1
    background = _background(rng, size + 2 * margin)
    phase = rng.uniform(0, 2 * np.pi, size=2)
    movers = _movers(rng, setting.movers)
    entries = rng.uniform(-2.0, 2.0, size=3)
    side = int(rng.choice([0, GRID]))
    crowd = _crowd(rng_of(scene.seed, scene.index, 5), scene)
    for number in range(count):
        time = (number + 0.5) / count
        sway = setting.sway * np.sin(2 * np.pi * np.array([0.7, 1.1]) * time + phase)
        canvas = _Canvas(background, size, margin, (float(sway[0]), float(sway[1])), setting.scale)
        _draw_movers(canvas, movers, time)
        _draw_crowd(canvas, crowd, time)
        _draw_scene(canvas, scene, time, entries, side, crowd.sleeve)
        yield canvas.pixels()


@dataclass(frozen=True)
class _Bystander:
    """A person behind the table: the end of each touch as a share of the clip, and its place and colour."""

    sleeve: Colour
    ends: tuple[float, ...]
    places: tuple[tuple[float, float], ...]
    colours: tuple[Colour, ...]
    square: tuple[bool, ...]
    entry: float


@dataclass(frozen=True)
class _Crowd:
    """Additions of the hard setting: colour of the person's sleeve, pieces on the table (x, y, colour), and people."""

    sleeve: Colour
    pieces: tuple[tuple[float, float, Colour], ...]
    bystanders: tuple[_Bystander, ...]


class _Canvas:
    """Draws in cells of the 7x7 grid, shifted by the camera's sway; radii and widths are multiplied by `scale`."""

    def __init__(self, background: Image.Image, size: int, margin: int, sway: tuple[float, float], scale: float):
        self.cell = size / GRID
        self.sway = sway
        self.scale = scale
        left, top = (margin - round(shift * self.cell) for shift in sway)
        self.image = background.crop((left, top, left + size, top + size))
        self.draw = ImageDraw.Draw(self.image)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return (x + self.sway[0]) * self.cell, (y + self.sway[1]) * self.cell

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        rx, ry = rx * self.scale, ry * self.scale
        self.draw.ellipse((*self._at(x - rx, y - ry), *self._at(x + rx, y + ry)), fill=colour)

    def box(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        rx, ry = rx * self.scale, ry * self.scale
        self.draw.rectangle((*self._at(x - rx, y - ry), *self._at(x + rx, y + ry)), fill=colour)

    def limb(self, start: tuple[float, float], end: tuple[float, float], colour: Colour) -> None:
        thick = max(1, round(LIMB_WIDTH * self.scale * self.cell))
        self.draw.line((*self._at(*start), *self._at(*end)), fill=colour, width=thick)

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image)


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    """Wall with clutter above, table below, and light grain on both."""
    image = Image.new("RGB", (side, side), TABLE)
    draw = ImageDraw.Draw(image)
    cell = side / GRID
    edge = WALL_ROWS * cell
    draw.rectangle((0, 0, side, edge), fill=WALL)
    for _ in range(7):
        x, width = rng.uniform(0, side), rng.uniform(0.3, 1.2) * cell
        height = rng.uniform(0.3, 1.3) * cell
        colour = tuple(int(c) for c in rng.integers(95, 160, size=3))
        draw.rectangle((x, edge - height, x + width, edge), fill=colour)
    grain = rng.normal(0, 4, size=(side, side, 1))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


def _movers(rng: np.random.Generator, count: int) -> list[tuple[Colour, float, float, float]]:
    """Colour, start, height and speed of the distractors, which have the objects' own colours."""
    colours = list(OBJECTS.values())
    return [
        (colours[int(rng.integers(len(colours)))], rng.uniform(0, GRID), rng.uniform(0.3, 1.2), rng.uniform(-4, 4))
        for _ in range(count)
    ]


def _draw_movers(canvas: _Canvas, movers: list[tuple[Colour, float, float, float]], time: float) -> None:
    for colour, start, height, speed in movers:
        canvas.disc((start + speed * time) % (GRID + 1) - 0.5, height, 0.4, 0.4, colour)


def _crowd(rng: np.random.Generator, scene: Scene) -> _Crowd:
    setting = scene.setting
    sleeve = _colour(rng, *SLEEVE_SHADES) if setting.sleeves else SLEEVE
    taken = {(int(thing.y), int(thing.x)) for thing in scene.things}
    free = [(row, column) for row in TABLE_ROWS for column in range(GRID) if (row, column) not in taken]
    chosen = [free[i] for i in rng.choice(len(free), size=setting.pieces, replace=False)]
    shifts = rng.uniform(0.3, 0.7, size=(setting.pieces, 2))
    pieces = tuple((column + x, row + y, _colour(rng, *PIECE_SHADES)) for (row, column), (x, y) in zip(chosen, shifts))
    return _Crowd(sleeve, pieces, tuple(_bystander(rng) for _ in range(setting.bystanders)))


def _bystander(rng: np.random.Generator) -> _Bystander:
    colours = list(OBJECTS.values())
    ends = np.sort(rng.uniform(0.15, 0.95, size=BYSTANDER_TOUCHES - 1))
    return _Bystander(
        sleeve=_colour(rng, *SLEEVE_SHADES),
        ends=(*map(float, ends), 1.0),
        places=tuple((rng.uniform(0.5, GRID - 0.5), rng.uniform(*BYSTANDER_ROWS)) for _ in range(BYSTANDER_TOUCHES)),
        colours=tuple(colours[int(rng.integers(len(colours)))] for _ in range(BYSTANDER_TOUCHES)),
        square=tuple(bool(rng.integers(2)) for _ in range(BYSTANDER_TOUCHES)),
        entry=rng.uniform(-1.5, 1.5),
    )


def _colour(rng: np.random.Generator, darkest: int, lightest: int) -> Colour:
    """A greyish colour, unlike any object's."""
    red, green, blue = (int(channel) for channel in rng.integers(darkest, lightest) + rng.integers(-25, 26, size=3))
    return red, green, blue


def _draw_crowd(canvas: _Canvas, crowd: _Crowd, time: float) -> None:
    for x, y, colour in crowd.pieces:
        canvas.disc(x, y, 0.45, 0.45, colour)
        canvas.disc(x, y, 0.2, 0.2, LID)
    for somebody in crowd.bystanders:
        touch = next(i for i, end in enumerate(somebody.ends) if time < end)
        x, y = somebody.places[touch]
        canvas.limb((x + somebody.entry, -0.5), (x, y), somebody.sleeve)
        canvas.disc(x, y, 0.8, 0.8, SKIN)
        shape = canvas.box if somebody.square[touch] else canvas.disc
        shape(x, y, 0.48, 0.48, somebody.colours[touch])
        canvas.disc(x, y, 0.2, 0.2, LID)


def _draw_scene(canvas: _Canvas, scene: Scene, time: float, entries: np.ndarray, side: int, sleeve: Colour) -> None:
    things = scene.things_at(time)
    held = {event.name: event for event in scene.events if event.start <= time < event.end}
    for name, event in held.items():  # beside the table, so behind everything on it
        if event.slot == "other":
            _draw_arm(canvas, things[name], (side, things[name].y + 0.5), OTHER_SLEEVE, OTHER_SKIN)
    for name, thing in things.items():
        if name not in held or held[name].slot == "other":
            _draw_thing(canvas, thing)
    for name, event in held.items():
        if event.slot != "other":
            thing = things[name]
            entry = thing.x + entries[("first", "second", "next").index(event.slot)]
            short = scene.setting.reach if event.slot == "next" else 0.0
            _draw_under(canvas, thing)
            _draw_arm(canvas, thing, (entry, GRID + 0.5), sleeve, SKIN, short)
            _draw_thing(canvas, thing)
            _draw_grip(canvas, thing, event.action)


def _draw_thing(canvas: _Canvas, thing: Thing) -> None:
    colour = OBJECTS[thing.name]
    radius = 0.48 + 0.08 * thing.height
    x, y = _top(thing)
    shape = canvas.box if thing.name.endswith(("box", "tin", "bag")) else canvas.disc
    shape(x, y, radius, radius, colour)
    canvas.disc(x, y, 0.2, 0.2, HOLE if thing.is_open else LID)


def _draw_arm(
    canvas: _Canvas, thing: Thing, entry: tuple[float, float], sleeve: Colour, skin: Colour, short: float = 0.0
) -> None:
    """A sleeve from the picture's edge to the object, and a hand around the object, or `short` cells before it."""
    x, y = _top(thing)
    way = np.array(entry) - (x, y)
    x, y = (float(axis) for axis in (x, y) + way * min(1.0, short / float(np.linalg.norm(way))))
    canvas.limb(entry, (x, y), sleeve)
    canvas.disc(x, y, 0.8, 0.8, skin)


def _draw_under(canvas: _Canvas, thing: Thing) -> None:
    """The shadow of a lifted object."""
    if thing.height > 0:
        x, y = _top(thing)
        canvas.disc(x, y + 0.75 * canvas.scale, 0.8, 0.32, SHADOW)


def _draw_grip(canvas: _Canvas, thing: Thing, action: Action | None) -> None:
    """The hand's action, drawn on top of the object."""
    (x, y), scale = _top(thing), canvas.scale
    if action == "open":
        canvas.disc(x + 0.6 * scale, y - 0.6 * scale, 0.34, 0.34, LID)
    elif action == "move":
        canvas.box(x - 0.85 * scale, y, 0.3, 0.2, SKIN)
        canvas.box(x + 0.85 * scale, y, 0.3, 0.2, SKIN)
    elif action == "close":
        canvas.box(x, y - 0.45 * scale, 0.5, 0.12, SKIN)
        canvas.box(x, y + 0.45 * scale, 0.5, 0.12, SKIN)


def _top(thing: Thing) -> tuple[float, float]:
    """Position at which an object is drawn: a lifted one is a quarter of a cell higher."""
    return thing.x, thing.y - 0.25 * thing.height
