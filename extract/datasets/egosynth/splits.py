"""EgoSynth's questions divided into the parts of the two splits, and turned into multiple choice.

The splits follow the released rules. Direct: all questions, 3:1:1 into train, test and val, answer by answer. Indirect:
direct references, and indirect ones that ask for an action (their program starts with `query([hoi], iterate_until(`),
are for training; all other indirect ones go 1:1 into test and val. The parts of such a question are known from
training, and only their composition is new.

Source of the rules: EgoTaskQA, `baselines/preprocess/split.py`.
"""

from collections.abc import Sequence

import numpy as np

from egopatch.extract.datasets.egosynth.questions import HOI_PROGRAM, Record
from egopatch.extract.datasets.egosynth.scene import OBJECTS
from egopatch.extract.datasets.records import Part

OPTIONS = 5  # of a multiple-choice question


def split_direct(records: Sequence[Record], rng: np.random.Generator) -> dict[Part, list[Record]]:
    """All questions, 3:1:1 into train, test and val, separately for each answer."""
    return _divide(records, {"train": 3, "val": 1, "test": 1}, rng)


def split_indirect(records: Sequence[Record], rng: np.random.Generator) -> dict[Part, list[Record]]:
    """Direct and action questions into train; the others 1:1 into test and val, separately for each answer."""

    def trains(record: Record) -> bool:
        return record["reference"] == "direct" or record["program"].startswith(HOI_PROGRAM)

    parts = _divide([r for r in records if not trains(r)], {"val": 1, "test": 1}, rng)
    return {"train": [record for record in records if trains(record)], **parts}


def multiple_choice(records: Sequence[Record], part: Part, rng: np.random.Generator) -> list[Record]:
    """The questions that ask for an object, as lines of `jsonl` with five options each.

    Objects are uniform given the text, the wrong options are drawn uniformly from those that the text does not name,
    and each index is right equally often: without the video nothing tells the options apart.
    """
    chosen = [record for record in records if record["answer"] in OBJECTS]
    lines = []
    for place, index in enumerate(rng.permutation(len(chosen)).tolist()):
        record, right = chosen[index], place % OPTIONS
        wrong = [name for name in OBJECTS if name != record["answer"] and name not in record["question"]]
        options = [str(name) for name in rng.permutation(wrong)[: OPTIONS - 1]]
        options.insert(right, record["answer"])
        lines.append(
            {
                "question_id": record["question_id"],
                "clip_id": record["interval"],
                "question": record["question"],
                "options": options,
                "answer_index": right,
                "part": part,
                "tags": record["reasoning_type"].split("$"),
            }
        )
    return sorted(lines, key=lambda line: line["question_id"])


def _divide(records: Sequence[Record], ratios: dict[Part, int], rng: np.random.Generator) -> dict[Part, list[Record]]:
    by_answer: dict[str, list[Record]] = {}
    for record in records:
        by_answer.setdefault(record["answer"], []).append(record)
    deck: list[Part] = [part for part, ratio in ratios.items() for _ in range(ratio)]
    parts: dict[Part, list[Record]] = {part: [] for part in ratios}
    for answer in sorted(by_answer):
        members = by_answer[answer]
        for place, index in enumerate(rng.permutation(len(members))):
            parts[deck[place % len(deck)]].append(members[index])
    return {part: sorted(members, key=lambda record: record["question_id"]) for part, members in parts.items()}
