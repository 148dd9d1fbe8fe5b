"""EgoSynth, what happens: objects on a table, and who touches which of them when, in a plain or a hard setting.

A scene is drawn from a seed alone. Every object stands in its own cell of a 7x7 grid over the picture (so it is about
one 16-pixel patch of a 112-pixel input), the two rows at the top are left to clutter. The clip's time is cut in four:

    [0.00, 0.50)  the person's hand comes in from below and acts on the first object
    [0.50, 0.75)  it acts on the second one
    [0.75, 1.00)  it reaches for a third one, which it will touch next
    throughout    the other person's hand, coming in from a side, holds a fourth one

The event log is the truth that all questions are made from.
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

# Shares of the clip's time: when each of the person's touches starts, and when the last one ends.
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
    """What makes scenes hard: how small things are, and how much there is to see that no question is about.

    Attributes:
        scale: of everything that is handled and of the hands, relative to the plain setting.
        reach: cells that the hand is short of what it will touch next.
        sway: of the camera, in cells.
        movers: coloured discs that pass along the wall.
        bystanders: people behind the table; what they handle looks like what is on it.
        pieces: neutral things that stand about on the table.
        sleeves: whether everybody's sleeves have a colour of their own, so that they do not tell who somebody is.
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
    """One touch. `action` is None where the hand only reaches or holds. Times are shares of the clip."""

    slot: Slot
    name: str
    action: Action | None
    start: float
    end: float


@dataclass(frozen=True)
class Scene:
    """A clip's objects as they stand at its start, and its event log.

    Attributes:
        index: number of the clip; `seed` and `index` decide everything.
        things: every object of `OBJECTS`, once.
        events: one of each slot.
        moves: which way a moved object goes, -1 or 1, by slot.
        difficulty: names the setting.
    """

    seed: int
    index: int
    things: tuple[Thing, ...]
    events: tuple[Event, ...]
    moves: tuple[int, int]
    difficulty: Difficulty = "plain"

    @property
    def setting(self) -> Setting:
        """How busy it is."""
        return SETTINGS[self.difficulty]

    def event(self, slot: Slot) -> Event:
        """The touch of that slot."""
        return next(event for event in self.events if event.slot == slot)

    def things_at(self, time: float) -> dict[str, Thing]:
        """Every object by name as it is at `time`, a share of the clip's length."""
        now = {thing.name: thing for thing in self.things}
        for event, way in zip(self.events, (*self.moves, 0, 0)):
            if event.action is not None and time >= event.start:
                now[event.name] = _acted(now[event.name], event, way, time)
        return now

    def at_end(self, name: str) -> Thing:
        """That object as it stands when the clip is over."""
        return self.things_at(1.0)[name]


def rng_of(seed: int, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of one clip and purpose, independent of how many clips there are."""
    return np.random.default_rng([seed, index, purpose])


def draw_scene(seed: int, index: int, difficulty: Difficulty = "plain") -> Scene:
    """The scene of clip `index`. What happens in it does not depend on the difficulty."""
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
    """Where on the table an object stands: a third of the width."""
    return PLACES[min(int(thing.x / GRID * len(PLACES)), len(PLACES) - 1)]


def _free_side(things: list[Thing], name: str) -> int:
    """The side, -1 or 1, on which an object has more room to be moved by one cell."""
    moved = next(thing for thing in things if thing.name == name)

    def room(way: int) -> float:
        x = moved.x + way
        others = [abs(t.x - x) + abs(t.y - moved.y) for t in things if t.name != name]
        return min(*others, 2.0) if 0.4 <= x <= GRID - 0.4 else -1.0

    return 1 if room(1) >= room(-1) else -1


def _acted(thing: Thing, event: Event, way: int, time: float) -> Thing:
    """An object `time` into what is done to it. Acts take the time from 15% to 40% of the touch."""
    done = float(np.clip(((time - event.start) / (event.end - event.start) - 0.15) / 0.25, 0, 1))
    if event.action == "open":
        return replace(thing, is_open=done > 0)
    if event.action == "close":
        return replace(thing, is_open=done <= 0)
    if event.action == "lift":  # up while it is held, then back
        return replace(thing, height=done if time < event.end else 0.0)
    return replace(thing, x=thing.x + way * done)
