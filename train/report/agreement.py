"""Does a head look where the answer is? Kept patches against EgoSynth's known places of the objects asked about."""

from dataclasses import dataclass

from egopatch.extract.datasets.egosynth.places import places_of, scene_of
from egopatch.train.report.answers import Questions
from egopatch.train.report.sources import Selection


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


def agreement(selection: Selection, questions: Questions, grid: tuple[int, int]) -> Agreement | None:
    """Agreement of a selection with the known places; None if no question is about a clip of EgoSynth."""
    _, frames, k = selection.kept.shape
    asked, others, kept_in_asked = [0, 0], [0, 0], 0
    for name, row in selection.rows.items():
        question = questions.by_id.get(name)
        scene = None if question is None else scene_of(question.clip_id)
        if question is None or scene is None:
            continue
        places = places_of(scene, question.text, frames, grid)
        for frame in range(frames):
            kept = set(selection.kept[row, frame].tolist())
            for counts, patches in ((asked, places.asked[frame]), (others, places.others[frame] - places.asked[frame])):
                counts[0] += len(kept & patches)
                counts[1] += len(patches)
            kept_in_asked += len(kept) if places.asked[frame] else 0
    if not asked[1]:
        return None
    return Agreement(
        100 * asked[0] / asked[1],
        100 * others[0] / max(others[1], 1),
        100 * k / (grid[0] * grid[1]),
        100 * asked[0] / kept_in_asked,
    )
