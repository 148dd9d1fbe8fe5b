"""The agreement of a run's recorded selection with EgoSynth's known places."""

from collections.abc import Iterator

from numpy.typing import NDArray

from egopatch.extract.datasets.egosynth.places import Places
from egopatch.features.values.spec import middle_indices
from egopatch.train.explanation.agreement import Agreement, agreement_of, known_places
from egopatch.train.report.answers import Questions
from egopatch.train.report.sources import Selection


def agreement(
    selection: Selection, questions: Questions, grid: tuple[int, int], frames: int | None = None
) -> Agreement | None:
    """Agreement of a selection with the known places; None if no question is about a clip of EgoSynth.

    Args:
        selection: Kept patches [Q, T, k].
        grid: Rows and columns of patches in a frame.
        frames: Number of stored frames, if the head reads T evenly spaced ones of them; None if it reads all.
    """

    def known() -> Iterator[tuple[NDArray, Places]]:
        for name, row in selection.rows.items():
            if (question := questions.by_id.get(name)) is not None:
                kept = selection.kept[row]
                stored = len(kept) if frames is None else frames
                places = known_places(question, stored, middle_indices(stored, len(kept)), grid)
                if places is not None:
                    yield kept, places

    return agreement_of(known(), grid[0] * grid[1])
