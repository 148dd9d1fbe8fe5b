"""Clips, questions and what is made of them refuse impossible values by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from egopatch.extract.datasets import Clip, DatasetError, Question
from egopatch.extract.datasets.records import answer_vocabulary, texts_of

CLIP, QUESTION = Clip("a", Path("a.mp4")), Question("1", "a", "what?", "a cup", "open", ())


def test_a_clip_or_question_that_cannot_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"^clip 'a': end_s is 1; expected more than start_s, which is 2$"):
        replace(CLIP, start_s=2, end_s=1)
    with pytest.raises(ValueError, match=r"^clip 'a': start_s is -1; expected seconds from the video's start"):
        replace(CLIP, start_s=-1)
    with pytest.raises(ValueError, match=r"^clip_id is None; expected a unique name$"):
        replace(CLIP, clip_id=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^question '1' has the answer 'a cup', which is not one of its options"):
        replace(QUESTION, options=("a hat", "a bowl"))
    with pytest.raises(ValueError, match=r"^question '1' has 1 option; expected 2 to 26$"):
        replace(QUESTION, options=("a cup",))


@pytest.mark.parametrize(
    ("make", "given", "why"),
    [
        (answer_vocabulary, "yes", "^train_answers is 'yes'; expected a list of answers$"),
        (answer_vocabulary, [QUESTION], r"^an item of train_answers is Question\(.*; expected an answer as text"),
        (
            texts_of,
            {"train": (QUESTION,)},
            "^an item of questions is 'train'; expected a Question: give the questions of all parts",
        ),
        (texts_of, [CLIP], r"^an item of questions is Clip\(.*; expected a Question"),
    ],
)
def test_parts_of_a_data_set_are_not_made_of_something_else(
    make: Callable[[object], object], given: object, why: str
) -> None:
    with pytest.raises(TypeError, match=why):
        make(given)


@pytest.mark.parametrize("problems", [[], "", ["a.json: no such file", " "]])
def test_an_error_about_a_data_set_says_what_is_wrong(problems: list[str] | str) -> None:
    with pytest.raises(
        ValueError, match=r"^problems is \(.*\); expected one line for each fault, at least one$"
    ) as raised:
        raise DatasetError(problems)
    assert raised.type is ValueError  # of the code that raises it, so that commands keep its traceback
