"""Compares a head's kept patches with the places of the objects asked about, which are known for EgoSynth.

Shape legend: T frames, k patches kept a frame.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from numpy.typing import NDArray

from egopatch.extract.datasets import Question
from egopatch.extract.datasets.egosynth.places import Places, places_of, scene_of


@dataclass(frozen=True)
class Agreement:
    """Percentages over the frames of all questions.

    Attributes:
        asked: Places of objects asked about whose patch is kept (recall).
        others: Places of other objects whose patch is kept; as high as `asked` if the question does not matter.
        chance: Patches kept: what a random selection would reach.
        precision: Kept patches that are the place of an object asked about, in frames that have one.
    """

    asked: float
    others: float
    chance: float
    precision: float


def known_places(question: Question, frames: int, read: Sequence[int], grid: tuple[int, int]) -> Places | None:
    """The places in those of `frames` uniform frames that `read` lists, for EgoSynth questions; None for others."""
    scene = scene_of(question.clip_id)
    if scene is None:
        return None
    places = places_of(scene, question.text, frames, grid)
    return Places(tuple(places.asked[frame] for frame in read), tuple(places.others[frame] for frame in read))


def agreement_of(selections: Iterable[tuple[NDArray, Places]], patches: int) -> Agreement | None:
    """Agreement of selections with the known places; None if no question asks about a place.

    Args:
        selections: For each question the kept patches [T, k], row-major in the grid, and the places.
        patches: Number of patches in a frame.
    """
    asked, others, kept_in_asked, kept_count = [0, 0], [0, 0], 0, 0
    for kept_tk, places in selections:
        kept_count = kept_tk.shape[1]
        for frame, row in enumerate(kept_tk):
            kept = set(row.tolist())
            for counts, found in ((asked, places.asked[frame]), (others, places.others[frame] - places.asked[frame])):
                counts[0] += len(kept & found)
                counts[1] += len(found)
            kept_in_asked += len(kept) if places.asked[frame] else 0
    if not asked[1]:
        return None
    return Agreement(
        100 * asked[0] / asked[1],
        100 * others[0] / max(others[1], 1),
        100 * kept_count / patches,
        100 * asked[0] / kept_in_asked,
    )


def pointing(best: Iterable[tuple[NDArray, Places]]) -> float | None:
    """The pointing game: of the frames with an object asked about, the percentage whose best patch is its place.

    Args:
        best: For each question the patch with the highest score in each frame [T], and the places.
    """
    hits = frames = 0
    for patches_t, places in best:
        for patch, asked in zip(patches_t.tolist(), places.asked, strict=True):
            if asked:
                hits += patch in asked
                frames += 1
    return 100 * hits / frames if frames else None
