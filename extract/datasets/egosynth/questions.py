"""EgoSynth's questions, generated from the event log in EgoTaskQA's vocabulary.

Every family of questions is drawn so that the text alone reveals almost nothing about the answer: objects, actions and
states are uniform, and verify questions are answered yes as often as no. Places are not quite uniform: three of the
table's seven columns are `middle`, which is right in 43% of the cases.

A *direct* question names an object ("the red box"), an *indirect* one describes it by what happens to it ("the object
that the person touches first").
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from egopatch.extract.datasets.egosynth.scene import OBJECTS, SLOTS, Event, Scene, Slot, place_of, rng_of

CLAUSES: dict[Slot, str] = {
    "first": "that the person touches first",
    "second": "that the person touches second",
    "next": "that the person will touch next",
    "other": "that the other person holds",
}
ARRIVALS: dict[Slot, str] = {
    "first": "the person reaches in first",
    "second": "the person reaches in second",
    "next": "the person will reach in next",
    "other": "the other person reaches in",
}
TOUCHES: dict[Slot, str] = {
    "first": "does the person touch the {} first?",
    "second": "does the person touch the {} second?",
    "next": "will the person touch the {} next?",
    "other": "does the other person hold the {}?",
}
TYPES: dict[Slot, tuple[str, ...]] = {
    "first": ("world",),
    "second": ("world",),
    "next": ("intent",),
    "other": ("multi-agent",),
}
CHANGES = {
    "lift": "from low to high",
    "move": "from one place to another",
    "open": "from closed to open",
    "close": "from open to closed",
}
# Each of the person's touches with the touch that follows it.
FOLLOWS: tuple[tuple[Slot, Slot], ...] = (("first", "second"), ("second", "next"))
BEFORE = {following: touch for touch, following in FOLLOWS}
HOI_PROGRAM = "query([hoi], iterate_until("

# Words of the questions -> words of their paraphrases.
OTHER_WORDS = {
    "which object": "what item",
    "the object": "the item",
    "an open object": "an item that stands open",
    "the person": "the camera wearer",
    "the other person": "somebody else",
    "will touch": "is about to handle",
    "touches": "handles",
    "touch the": "handle the",
    "will reach in": "is about to stretch out a hand",
    "reaches in": "stretches out a hand",
    "holds": "carries",
    "hold": "carry",
    "go to": "turn to",
    "do to": "do with",
    "where is": "in which place is",
    "which is": "what is",
    "open at the end": "standing open when it is over",
    "at the end": "when it is over",
    "change": "become different",
}
_PHRASES = re.compile("|".join(rf"\b{words}\b" for words in sorted(OTHER_WORDS, key=len, reverse=True)))

Record = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """A question without its number."""

    text: str
    answer: str
    types: tuple[str, ...]
    category: str
    semantic: str
    structural: str
    reference: str
    program: str

    def record(self, question_id: int, video_id: int, interval: str) -> Record:
        """The question as a record of EgoTaskQA's files, without `answer_encode`."""
        return {
            "question": _sentence(self.text),
            "text_pos": _sentence(paraphrase(self.text)),
            "text_neg": _sentence(counterfactual(self.text)),
            "answer": self.answer,
            "question_id": question_id,
            "video_id": video_id,
            "interval": interval,
            "type": list(self.types),
            "category": [self.category],
            "semantic": self.semantic,
            "structural": self.structural,
            "reference": self.reference,
            "reasoning_type": "$".join((*self.types, self.category, self.semantic, self.structural, self.reference)),
            "program": self.program,
        }


def paraphrase(text: str) -> str:
    """The same question, with its parts in the same order, in words that no original question uses."""
    return _PHRASES.sub(lambda found: OTHER_WORDS[found[0]], text)


def counterfactual(text: str) -> str:
    """The question about the touch that follows, or about the next object if the text names no touch."""
    for slot, following in zip(SLOTS, (*SLOTS[1:], SLOTS[0]), strict=True):
        if CLAUSES[slot] in text or ARRIVALS[slot] in text:
            return text.replace(CLAUSES[slot], CLAUSES[following]).replace(ARRIVALS[slot], ARRIVALS[following])
    names = list(OBJECTS)
    name, following_name = next(
        pair for pair in zip(names, [*names[1:], names[0]], strict=True) if f"the {pair[0]}" in text
    )
    return text.replace(f"the {name}", f"the {following_name}")


def drafts(scene: Scene, count: int) -> list[Draft]:
    """`count` different questions about one clip, families drawn by their weight."""
    rng = rng_of(scene.seed, scene.index, 2)
    weights = np.array([family.hard if scene.difficulty == "hard" else family.plain for family in FAMILIES])
    found: dict[str, Draft] = {}
    while len(found) < count:
        draft = FAMILIES[int(rng.choice(len(FAMILIES), p=weights / weights.sum()))].draw(scene, rng)
        found.setdefault(draft.text, draft)
    return list(found.values())


def _any(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


# What a program queries or verifies -> the question's semantic type, and the answer by the touch that it asks about.
ANSWERS: dict[str, tuple[str, Callable[[Scene, Event], str]]] = {
    "[obj]": ("object", lambda scene, event: event.name),
    "[hoi]": ("action", lambda scene, event: str(event.action)),
    "[change]": ("change", lambda scene, event: CHANGES[str(event.action)]),
    "[state]": ("state", lambda scene, event: _yes(scene.at_end(event.name).is_open)),
    "[place]": ("state", lambda scene, event: place_of(scene.at_end(event.name))),
}


@dataclass(frozen=True)
class _AboutTouch:
    """A family of questions about one touch. The program decides the answer, and whether the question is indirect.

    Attributes:
        plain, hard: Share of the family among all questions, in the plain and in the hard setting.
        text, program: With these names in braces: the `slot` of the touch, the `clause` and the `arrival` that describe
            it, and the `name` of its object; and `before`, `before_clause` and `before_name`, of the touch before it.
        slots: Touches that may be asked about.
        category: Category of the questions; None: it depends on the touch.
        intent: Whether the questions are about intent too, whichever touch they ask about.
    """

    plain: float
    hard: float
    text: str
    program: str
    slots: Sequence[Slot] = SLOTS
    category: str | None = None
    intent: bool = False

    def draw(self, scene: Scene, rng: np.random.Generator) -> Draft:
        """One of the questions."""
        slot: Slot = _any(rng, self.slots)
        before, event = BEFORE.get(slot, slot), scene.event(slot)
        text = self.text.format(
            clause=CLAUSES[slot],
            arrival=ARRIVALS[slot],
            name=event.name,
            before_clause=CLAUSES[before],
            before_name=scene.event(before).name,
        )
        program = self.program.format(slot=slot, before=before)
        structural, asked, _ = re.split(r"\(|, ", program, maxsplit=2)
        semantic, answer_of = ANSWERS[asked]
        types = tuple(dict.fromkeys((*TYPES[slot], "intent"))) if self.intent else TYPES[slot]
        category = self.category or _when(slot)
        reference = "indirect" if "iterate_until" in program else "direct"
        return Draft(text, answer_of(scene, event), types, category, semantic, structural, reference, program)


@dataclass(frozen=True)
class _Drawn:
    """A family of other questions: its shares as in `_AboutTouch`, and the function that draws one."""

    plain: float
    hard: float
    draw: Callable[[Scene, np.random.Generator], Draft]


def _touch(scene: Scene, rng: np.random.Generator) -> Draft:
    """Ask about the slot's object (yes) or about another slot's (no), so that a hand is always at the object."""
    slot = _any(rng, SLOTS)
    yes = bool(rng.integers(2))
    other = _any(rng, [s for s in SLOTS if s != slot])
    name = scene.event(slot if yes else other).name
    text = TOUCHES[slot].format(name)
    program = f"verify([hoi], {slot})"
    return Draft(text, _yes(yes), TYPES[slot], _when(slot), "action", "verify", "direct", program)


def _touch_without(scene: Scene, rng: np.random.Generator) -> Draft:
    yes = bool(rng.integers(2))
    name = scene.event("first" if yes else "second").name
    text = f"if the person stopped after the first touch, would the person touch the {name}?"
    program = "verify([hoi], without(second))"
    return Draft(text, _yes(yes), ("world",), "counterfactual", "action", "verify", "direct", program)


def _open(scene: Scene, rng: np.random.Generator) -> Draft:
    yes = bool(rng.integers(2))
    fitting = [name for name in OBJECTS if scene.at_end(name).is_open == yes] or list(OBJECTS)
    name = _any(rng, fitting)
    answer = _yes(scene.at_end(name).is_open)
    text = f"is the {name} open at the end?"
    return Draft(text, answer, ("world",), "descriptive", "state", "verify", "direct", "verify([state], name)")


def _place(scene: Scene, rng: np.random.Generator) -> Draft:
    name = _any(rng, list(OBJECTS))
    text = f"where is the {name} at the end?"
    place = place_of(scene.at_end(name))
    return Draft(text, place, ("world",), "descriptive", "state", "query", "direct", "query([place], name)")


def _when(slot: Slot) -> str:
    return "predictive" if slot == "next" else "descriptive"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


_reason = partial(_AboutTouch, category="explanatory", intent=True)
_without = partial(_AboutTouch, slots=("second",), category="counterfactual")
_after = partial(_AboutTouch, slots=tuple(BEFORE))
_acted = partial(_AboutTouch, slots=("first", "second"))

# The hard setting has more questions that need several frames or the whole table.
FAMILIES: tuple[_AboutTouch | _Drawn, ...] = (
    _AboutTouch(0.20, 0.12, "which object is it {clause}?", "query([obj], {slot})"),
    _AboutTouch(0.12, 0.12, "which is the object {clause}?", "query([obj], iterate_until({slot}))"),
    _reason(0.08, 0.06, "{arrival}, for which object is it?", "query([obj], reason({slot}))"),
    _reason(
        0.05, 0.05, "{arrival} for the object {clause}, which is it?", "query([obj], reason(iterate_until({slot})))"
    ),
    _without(
        0.02,
        0.02,
        "which object is it {clause}, but not if they stopped after the first touch?",
        "query([obj], without({slot}))",
    ),
    _without(
        0.03,
        0.03,
        "which is the object {clause}, but not if they stopped after the first touch?",
        "query([obj], without(iterate_until({slot})))",
    ),
    _Drawn(0.03, 0.03, _touch),
    _Drawn(0.01, 0.01, _touch_without),
    _after(0.0, 0.08, "which object does the person go to after the {before_name}?", "query([obj], after(name))"),
    _after(
        0.0,
        0.04,
        "which object does the person go to after the object {before_clause}?",
        "query([obj], after(iterate_until({before})))",
    ),
    _Drawn(0.03, 0.03, _open),
    _AboutTouch(0.10, 0.06, "is it an open object at the end {clause}?", "verify([state], {slot})"),
    _AboutTouch(0.06, 0.04, "is the object {clause} open at the end?", "verify([state], iterate_until({slot}))"),
    _Drawn(0.04, 0.05, _place),
    _AboutTouch(0.03, 0.04, "where is it at the end {clause}?", "query([place], {slot})"),
    _AboutTouch(0.03, 0.04, "where is the object {clause} at the end?", "query([place], iterate_until({slot}))"),
    _acted(0.04, 0.04, "what does the person do to the {name}?", "query([hoi], name)"),
    _acted(0.05, 0.05, "what does the person do to the object {clause}?", HOI_PROGRAM + "{slot}))"),
    _acted(
        0.02, 0.02, "because of which action does the {name} change?", "query([hoi], cause)", category="explanatory"
    ),
    _acted(0.03, 0.04, "how does the {name} change?", "query([change], name)"),
    _acted(0.03, 0.04, "how does it change {clause}?", "query([change], {slot})"),
    _acted(0.03, 0.04, "how does the object {clause} change?", "query([change], iterate_until({slot}))"),
)
