"""EgoSynth's scenes: objects on a table, and who touches which of them when, in a plain or a hard setting.

A scene is drawn from a seed alone. Every object stands in its own cell of a 7x7 grid over the picture (so it covers
about one 16-pixel patch of a 112-pixel input); the two top rows hold clutter. A clip has four touches:

    [0.00, 0.50)  the person's hand comes in from below and acts on the first object
    [0.50, 0.75)  the hand acts on the second object
    [0.75, 1.00)  the hand reaches for a third object, which it will touch next
    throughout    the other person's hand, coming in from a side, holds a fourth object

All questions are generated from the event log.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Action = Literal["lift", "move", "open", "close"]
Difficulty = Literal["plain", "hard"]
Slot = Literal["first", "second", "next", "other"]
SLOTS: tuple[Slot, ...] = ("first", "second", "next", "other")
ACTIONS: tuple[Action, ...] = ("lift", "move", "open", "close")
PLACES = ("left", "middle", "right")

GRID = 7
TABLE_ROWS = (2, 3, 4, 5)

# Shares of the clip's length at which each touch starts and ends.
STARTS: dict[Slot, float] = {"first": 0.0, "second": 0.5, "next": 0.75, "other": 0.0}
ENDS: dict[Slot, float] = {"first": 0.5, "second": 0.75, "next": 1.0, "other": 1.0}

OBJECTS: dict[str, tuple[int, int, int]] = {
    "red box": (230, 20, 25),
    "blue jar": (20, 40, 235),
    "green can": (0, 170, 40),
    "yellow tin": (255, 230, 0),
    "purple bag": (150, 20, 200),
    "cyan bottle": (0, 220, 235),
}


@dataclass(frozen=True)
class Setting:
    """Difficulty of scenes: the size of the objects, and the number of distractors.

    Attributes:
        scale: Size of objects and hands, relative to the plain setting.
        reach: Distance in cells between the hand and the object that it will touch next.
        sway: Amplitude of the camera's sway, in cells.
        movers: Number of coloured discs that pass along the wall.
        bystanders: Number of people behind the table; what they handle looks like the objects on it.
        pieces: Number of neutral pieces on the table.
        sleeves: Whether every sleeve has a random colour, so that sleeves do not identify people.
    """

    scale: float
    reach: float
    sway: float
    movers: int
    bystanders: int
    pieces: int
    sleeves: bool


SETTINGS: dict[Difficulty, Setting] = {
    "plain": Setting(scale=1.0, reach=0.0, sway=0.1, movers=2, bystanders=0, pieces=0, sleeves=False),
    "hard": Setting(scale=0.7, reach=0.6, sway=0.15, movers=2, bystanders=2, pieces=6, sleeves=True),
}


@dataclass(frozen=True)
class Thing:
    """An object on the table: its centre in cells of the 7x7 grid, and whether it is open."""

    name: str
    x: float
    y: float
    is_open: bool
    height: float = 0.0


@dataclass(frozen=True)
class Event:
    """One touch. `action` is None if the hand only reaches or holds. Times are shares of the clip's length."""

    slot: Slot
    name: str
    action: Action | None
    start: float
    end: float


@dataclass(frozen=True)
class Scene:
    """A clip's objects as they stand at its start, and its event log.

    Attributes:
        index: Number of the clip; `seed` and `index` decide everything.
        things: Every object of `OBJECTS`, once.
        events: One event for each slot.
        moves: Direction in which a moved object goes, -1 or 1, for the first and the second event.
        difficulty: Name of the setting.
    """

    seed: int
    index: int
    things: tuple[Thing, ...]
    events: tuple[Event, ...]
    moves: tuple[int, int]
    difficulty: Difficulty = "plain"

    @property
    def setting(self) -> Setting:
        """The setting that `difficulty` names."""
        return SETTINGS[self.difficulty]

    def event(self, slot: Slot) -> Event:
        """The event of this slot."""
        return next(event for event in self.events if event.slot == slot)

    def things_at(self, time: float) -> dict[str, Thing]:
        """Every object by name, in its state at `time`, a share of the clip's length."""
        now = {thing.name: thing for thing in self.things}
        for event, way in zip(self.events, (*self.moves, 0, 0)):
            if event.action is not None and time >= event.start:
                now[event.name] = _acted(now[event.name], event, way, time)
        return now

    def at_end(self, name: str) -> Thing:
        """The object `name` in its state at the end of the clip."""
        return self.things_at(1.0)[name]


def rng_of(seed: int, index: int, purpose: int) -> np.random.Generator:
    """Random generator for one clip and purpose, independent of the number of clips."""
    return np.random.default_rng([seed, index, purpose])


def draw_scene(seed: int, index: int, difficulty: Difficulty = "plain") -> Scene:
    """The scene of clip `index`; its events do not depend on the difficulty."""
    rng = rng_of(seed, index, 0)
    names = list(OBJECTS)
    cells = [(row, column) for row in TABLE_ROWS for column in range(GRID)]
    chosen = rng.choice(len(cells), size=len(names), replace=False)
    is_open = rng.integers(0, 2, size=len(names)).astype(bool)
    jitter = rng.uniform(-0.06, 0.06, size=(len(names), 2))
    touched = [names[i] for i in rng.choice(len(names), size=len(SLOTS), replace=False)]
    actions: list[Action | None] = [ACTIONS[i] for i in rng.integers(0, len(ACTIONS), size=2)] + [None, None]
    things = []
    for i, name in enumerate(names):
        row, column = cells[chosen[i]]
        state = bool(is_open[i])
        for target, action in zip(touched, actions):
            if target == name and action in ("open", "close"):
                state = action == "close"
        things.append(Thing(name, column + 0.5 + jitter[i, 0], row + 0.5 + jitter[i, 1], state))
    events = tuple(
        Event(slot, name, action, STARTS[slot], ENDS[slot]) for slot, name, action in zip(SLOTS, touched, actions)
    )
    moves = _free_side(things, touched[0]), _free_side(things, touched[1])
    return Scene(seed, index, tuple(things), events, moves, difficulty)


def place_of(thing: Thing) -> str:
    """Third of the table's width in which an object stands."""
    return PLACES[min(int(thing.x / GRID * len(PLACES)), len(PLACES) - 1)]


def _free_side(things: list[Thing], name: str) -> int:
    """Direction, -1 or 1, in which an object has more room to move by one cell."""
    moved = next(thing for thing in things if thing.name == name)

    def room(way: int) -> float:
        x = moved.x + way
        others = [abs(t.x - x) + abs(t.y - moved.y) for t in things if t.name != name]
        return min(*others, 2.0) if 0.4 <= x <= GRID - 0.4 else -1.0

    return 1 if room(1) >= room(-1) else -1


def _acted(thing: Thing, event: Event, way: int, time: float) -> Thing:
    """An object at `time` during `event`. An action takes place from 15% to 40% of the touch."""
    done = float(np.clip(((time - event.start) / (event.end - event.start) - 0.15) / 0.25, 0, 1))
    if event.action == "open":
        return replace(thing, is_open=done > 0)
    if event.action == "close":
        return replace(thing, is_open=done <= 0)
    if event.action == "lift":  # raised while it is held, then put back
        return replace(thing, height=done if time < event.end else 0.0)
    return replace(thing, x=thing.x + way * done)
