"""The agreement of a run's recorded selection with EgoSynth's known places."""

from collections.abc import Iterator

from numpy.typing import NDArray

from egopatch.extract.datasets.egosynth.places import Places, places_of, scene_of
from egopatch.features.values.spec import middle_indices
from egopatch.train.explanation.agreement import Agreement, agreement_of
from egopatch.train.report.answers import Questions
from egopatch.train.report.sources import Selection


def agreement(
    selection: Selection, questions: Questions, grid: tuple[int, int], frames: int | None = None
) -> Agreement | None:
    """Agreement of a selection with the known places; None if no question is about a clip of EgoSynth.

    Args:
        selection: Kept patches [Q, T, k].
        questions: The questions.
        grid: Rows and columns of patches in a frame.
        frames: Number of stored frames, where the head reads T evenly spaced ones of them; None: it reads all.
    """

    def known() -> Iterator[tuple[NDArray, Places]]:
        for name, row in selection.rows.items():
            question = questions.by_id.get(name)
            scene = None if question is None else scene_of(question.clip_id)
            if question is not None and scene is not None:
                kept = selection.kept[row]
                stored = len(kept) if frames is None else frames
                places = places_of(scene, question.text, stored, grid)
                read = middle_indices(stored, len(kept))
                yield kept, Places(tuple(places.asked[f] for f in read), tuple(places.others[f] for f in read))

    return agreement_of(known(), grid[0] * grid[1])
