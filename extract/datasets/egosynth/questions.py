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

    def record(self, question_id: int, video_id: int, interval: str) -> dict[str, Any]:
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
    weights = np.array([hard if scene.difficulty == "hard" else plain for _, plain, hard in FAMILIES])
    found: dict[str, Draft] = {}
    while len(found) < count:
        family = FAMILIES[int(rng.choice(len(FAMILIES), p=weights / weights.sum()))][0]
        draft = family(scene, rng)
        found.setdefault(draft.text, draft)
    return list(found.values())


def _any(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _object(scene: Scene, rng: np.random.Generator) -> Draft:
    slot = _any(rng, SLOTS)
    text = f"which object is it {CLAUSES[slot]}?"
    name = scene.event(slot).name
    return Draft(text, name, TYPES[slot], _when(slot), "object", "query", "direct", f"query([obj], {slot})")


def _object_indirect(scene: Scene, rng: np.random.Generator) -> Draft:
    slot = _any(rng, SLOTS)
    text = f"which is the object {CLAUSES[slot]}?"
    program = f"query([obj], iterate_until({slot}))"
    return Draft(text, scene.event(slot).name, TYPES[slot], _when(slot), "object", "query", "indirect", program)


def _reason(scene: Scene, rng: np.random.Generator) -> Draft:
    slot = _any(rng, SLOTS)
    text = f"{ARRIVALS[slot]}, for which object is it?"
    program = f"query([obj], reason({slot}))"
    name = scene.event(slot).name
    return Draft(text, name, _with_intent(slot), "explanatory", "object", "query", "direct", program)


def _reason_indirect(scene: Scene, rng: np.random.Generator) -> Draft:
    slot = _any(rng, SLOTS)
    text = f"{ARRIVALS[slot]} for the object {CLAUSES[slot]}, which is it?"
    program = f"query([obj], reason(iterate_until({slot})))"
    name = scene.event(slot).name
    return Draft(text, name, _with_intent(slot), "explanatory", "object", "query", "indirect", program)


def _untouched(scene: Scene, rng: np.random.Generator) -> Draft:
    text = f"which object is it {CLAUSES['second']}, but not if they stopped after the first touch?"
    name = scene.event("second").name
    return Draft(text, name, ("world",), "counterfactual", "object", "query", "direct", "query([obj], without(second))")


def _untouched_indirect(scene: Scene, rng: np.random.Generator) -> Draft:
    text = f"which is the object {CLAUSES['second']}, but not if they stopped after the first touch?"
    program = "query([obj], without(iterate_until(second)))"
    name = scene.event("second").name
    return Draft(text, name, ("world",), "counterfactual", "object", "query", "indirect", program)


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


def _after(scene: Scene, rng: np.random.Generator) -> Draft:
    """The touch that follows the touch of a named object."""
    before, slot = _any(rng, FOLLOWS)
    text = f"which object does the person go to after the {scene.event(before).name}?"
    name = scene.event(slot).name
    return Draft(text, name, TYPES[slot], _when(slot), "object", "query", "direct", "query([obj], after(name))")


def _after_indirect(scene: Scene, rng: np.random.Generator) -> Draft:
    before, slot = _any(rng, FOLLOWS)
    text = f"which object does the person go to after the object {CLAUSES[before]}?"
    program = f"query([obj], after(iterate_until({before})))"
    return Draft(text, scene.event(slot).name, TYPES[slot], _when(slot), "object", "query", "indirect", program)


def _open(scene: Scene, rng: np.random.Generator) -> Draft:
    yes = bool(rng.integers(2))
    fitting = [name for name in OBJECTS if scene.at_end(name).is_open == yes] or list(OBJECTS)
    name = _any(rng, fitting)
    answer = _yes(scene.at_end(name).is_open)
    text = f"is the {name} open at the end?"
    return Draft(text, answer, ("world",), "descriptive", "state", "verify", "direct", "verify([state], name)")


def _touch_open(scene: Scene, rng: np.random.Generator) -> Draft:
    slot = _any(rng, SLOTS)
    answer = _yes(scene.at_end(scene.event(slot).name).is_open)
    text = f"is it an open object at the end {CLAUSES[slot]}?"
    return Draft(text, answer, TYPES[slot], _when(slot), "state", "verify", "direct", f"verify([state], {slot})")


def _open_indirect(scene: Scene, rng: np.random.Generator) -> Draft:
    slot = _any(rng, SLOTS)
    answer = _yes(scene.at_end(scene.event(slot).name).is_open)
    text = f"is the object {CLAUSES[slot]} open at the end?"
    program = f"verify([state], iterate_until({slot}))"
    return Draft(text, answer, TYPES[slot], _when(slot), "state", "verify", "indirect", program)


def _place(scene: Scene, rng: np.random.Generator) -> Draft:
    name = _any(rng, list(OBJECTS))
    text = f"where is the {name} at the end?"
    place = place_of(scene.at_end(name))
    return Draft(text, place, ("world",), "descriptive", "state", "query", "direct", "query([place], name)")


def _place_touch(scene: Scene, rng: np.random.Generator) -> Draft:
    slot = _any(rng, SLOTS)
    place = place_of(scene.at_end(scene.event(slot).name))
    text = f"where is it at the end {CLAUSES[slot]}?"
    return Draft(text, place, TYPES[slot], _when(slot), "state", "query", "direct", f"query([place], {slot})")


def _place_indirect(scene: Scene, rng: np.random.Generator) -> Draft:
    slot = _any(rng, SLOTS)
    text = f"where is the object {CLAUSES[slot]} at the end?"
    place = place_of(scene.at_end(scene.event(slot).name))
    program = f"query([place], iterate_until({slot}))"
    return Draft(text, place, TYPES[slot], _when(slot), "state", "query", "indirect", program)


def _acted_on(scene: Scene, rng: np.random.Generator) -> Event:
    return scene.event(_any(rng, ("first", "second")))


def _action(scene: Scene, rng: np.random.Generator) -> Draft:
    event = _acted_on(scene, rng)
    text = f"what does the person do to the {event.name}?"
    return Draft(text, str(event.action), ("world",), "descriptive", "action", "query", "direct", "query([hoi], name)")


def _action_indirect(scene: Scene, rng: np.random.Generator) -> Draft:
    event = _acted_on(scene, rng)
    text = f"what does the person do to the object {CLAUSES[event.slot]}?"
    program = f"{HOI_PROGRAM}{event.slot}))"
    return Draft(text, str(event.action), ("world",), "descriptive", "action", "query", "indirect", program)


def _cause(scene: Scene, rng: np.random.Generator) -> Draft:
    event = _acted_on(scene, rng)
    text = f"because of which action does the {event.name} change?"
    return Draft(text, str(event.action), ("world",), "explanatory", "action", "query", "direct", "query([hoi], cause)")


def _change(scene: Scene, rng: np.random.Generator) -> Draft:
    event = _acted_on(scene, rng)
    text = f"how does the {event.name} change?"
    answer = CHANGES[str(event.action)]
    return Draft(text, answer, ("world",), "descriptive", "change", "query", "direct", "query([change], name)")


def _change_touch(scene: Scene, rng: np.random.Generator) -> Draft:
    event = _acted_on(scene, rng)
    answer = CHANGES[str(event.action)]
    text = f"how does it change {CLAUSES[event.slot]}?"
    return Draft(text, answer, ("world",), "descriptive", "change", "query", "direct", f"query([change], {event.slot})")


def _change_indirect(scene: Scene, rng: np.random.Generator) -> Draft:
    event = _acted_on(scene, rng)
    text = f"how does the object {CLAUSES[event.slot]} change?"
    program = f"query([change], iterate_until({event.slot}))"
    answer = CHANGES[str(event.action)]
    return Draft(text, answer, ("world",), "descriptive", "change", "query", "indirect", program)


def _when(slot: Slot) -> str:
    return "predictive" if slot == "next" else "descriptive"


def _with_intent(slot: Slot) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*TYPES[slot], "intent")))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# Shares of the families of questions in the plain and in the hard setting; the hard one has more questions that need
# several frames or the whole table.
FAMILIES: tuple[tuple[Callable[[Scene, np.random.Generator], Draft], float, float], ...] = (
    (_object, 0.20, 0.12),
    (_object_indirect, 0.12, 0.12),
    (_reason, 0.08, 0.06),
    (_reason_indirect, 0.05, 0.05),
    (_untouched, 0.02, 0.02),
    (_untouched_indirect, 0.03, 0.03),
    (_touch, 0.03, 0.03),
    (_touch_without, 0.01, 0.01),
    (_after, 0.0, 0.08),
    (_after_indirect, 0.0, 0.04),
    (_open, 0.03, 0.03),
    (_touch_open, 0.10, 0.06),
    (_open_indirect, 0.06, 0.04),
    (_place, 0.04, 0.05),
    (_place_touch, 0.03, 0.04),
    (_place_indirect, 0.03, 0.04),
    (_action, 0.04, 0.04),
    (_action_indirect, 0.05, 0.05),
    (_cause, 0.02, 0.02),
    (_change, 0.03, 0.04),
    (_change_touch, 0.03, 0.04),
    (_change_indirect, 0.03, 0.04),
)
