"""All test questions of a split with every system's answer, and all pairs of systems, as data for the page's script.

Texts, clips, tags and answers that repeat are stored once, so that 20,000 questions take a few megabytes.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from egopatch.train.report.answers import Correctness, Questions, column_masks
from egopatch.train.scores.statistics import compare


class _Numbered(dict[Any, int]):
    """Values in the order of their first appearance, each with its number."""

    def __missing__(self, value: Any) -> int:
        return self.setdefault(value, len(self))


def question_list(questions: Questions, correctness: Mapping[str, Correctness]) -> dict[str, Any]:
    """The questions and the answers of every system's seed that is best on val.

    `systems` are the labels. `id`, `text`, `clip`, `tags` and `answer` have an entry for each question, the last four
    as numbers into `texts`, `clips`, `tag_sets` and `answers`. `form` has a letter for each question, `o` or `b`.
    `given` has a list of answers for each system, and `right` a text of 0 and 1.
    """
    texts, clips, tag_sets, answers = _Numbered(), _Numbered(), _Numbered(), _Numbered()
    asked = list(questions.by_id.values())
    result = {
        "systems": list(correctness),
        "id": [question.question_id for question in asked],
        "text": [texts[question.text] for question in asked],
        "clip": [clips[question.clip_id] for question in asked],
        "tags": [tag_sets[tuple(question.tags)] for question in asked],
        "form": "".join(question.form[0] for question in asked),
        "answer": [answers[question.answer] for question in asked],
        "given": [
            [answers[system.answers[question.question_id]] for question in asked] for system in correctness.values()
        ],
        "right": [
            "".join("01"[system.right[question.question_id]] for question in asked) for system in correctness.values()
        ],
    }
    return result | {"texts": [*texts], "clips": [*clips], "tag_sets": [*tag_sets], "answers": [*answers]}


def pairs(questions: Questions, correctness: Mapping[str, Correctness]) -> list[dict[str, Any]]:
    """Every pair of systems once: the first one's lead over the second, over all seeds, with a 95% interval.

    `all`, `open` and `binary` have `[difference, low, high, verdict]`; a column without questions is left out.
    """
    # As numbers, which compare faster than names.
    _, clips = np.unique(questions.clip_ids, return_inverse=True)
    labels, result = list(correctness), []
    columns = dict(reversed(column_masks(questions.by_id.values()).items()))
    for first in range(len(labels)):
        for second in range(first + 1, len(labels)):
            found: dict[str, Any] = {"first": first, "second": second}
            for column, counted in columns.items():
                ours, theirs = (correctness[labels[row]].by_seed[:, counted] for row in (first, second))
                compared = compare(ours, theirs, clips[counted].tolist())
                gap = compared.difference
                found[column] = [round(gap.mean, 2), round(gap.low, 2), round(gap.high, 2), compared.verdict]
            result.append(found)
    return result


def anchor(split: str, question_id: str) -> str:
    """The part after `#` of a link to a question; the page's script builds the same one."""
    return f"q/{quote(split, safe=_SAFE)}/{quote(question_id, safe=_SAFE)}"


# Characters that JavaScript's encodeURIComponent leaves unchanged.
_SAFE = "!*'()~-._"


def as_script(values: Sequence[Mapping[str, Any]]) -> Markup:
    """JSON that is safe inside a script element: it contains no character with a meaning in HTML."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)
