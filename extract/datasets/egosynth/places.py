"""Positions of the objects that a question asks about; EgoSynth draws a clip's scene from its name, so they are known.

Shape legend: T frames.
"""

import re
from dataclasses import dataclass

from egopatch.extract.datasets.egosynth.questions import ARRIVALS, CLAUSES, FOLLOWS
from egopatch.extract.datasets.egosynth.scene import GRID, OBJECTS, SLOTS, Difficulty, Scene, Thing, draw_scene

_CLIP = re.compile(r"egosynth(?:-(?P<difficulty>hard))?-(?P<seed>\d+)-(?P<index>\d{6})\|")
_AFTER = "go to after"


@dataclass(frozen=True)
class Places:
    """Patches of objects in every frame, row-major in the grid.

    Attributes:
        asked: [T] patches of the objects that the question asks about: objects it names, in all frames, and objects it
            describes by a touch ("that the person touches first"), in the frames of that touch.
        others: [T] patches of all other objects.
    """

    asked: tuple[frozenset[int], ...]
    others: tuple[frozenset[int], ...]


def scene_of(clip_id: str) -> Scene | None:
    """The scene of a clip; None for clips of other data sets."""
    found = _CLIP.match(clip_id)
    if found is None:
        return None
    difficulty: Difficulty = "hard" if found["difficulty"] else "plain"
    return draw_scene(int(found["seed"]), int(found["index"]), difficulty)


def places_of(scene: Scene, question: str, frames: int, grid: tuple[int, int]) -> Places:
    """Where objects stand in `frames` uniform frames; camera sway and lifting, both under half a cell, are left out."""
    text = question.lower()
    named = {name for name in OBJECTS if name in text}
    slots = {slot for slot in SLOTS if CLAUSES[slot] in text or ARRIVALS[slot] in text}
    if _AFTER in text:
        before = slots | {slot for slot in SLOTS if scene.event(slot).name in named}
        slots |= {after for first, after in FOLLOWS if first in before}
    events = [scene.event(slot) for slot in slots]
    described = {event.name for event in events}
    asked, others = [], []
    for frame in range(frames):
        time = (2 * frame + 1) / (2 * frames)
        now = {event.name for event in events if event.start <= time < event.end}
        things = scene.things_at(time)
        asked.append(frozenset(_patch(things[name], grid) for name in named | now))
        others.append(frozenset(_patch(things[name], grid) for name in things.keys() - named - described))
    return Places(tuple(asked), tuple(others))


def _patch(thing: Thing, grid: tuple[int, int]) -> int:
    rows, columns = grid
    row = min(max(int(thing.y / GRID * rows), 0), rows - 1)
    return row * columns + min(max(int(thing.x / GRID * columns), 0), columns - 1)
