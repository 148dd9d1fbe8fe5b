"""Kept patches compared with the known object locations of EgoSynth."""

import numpy as np

from egopatch.extract.datasets import Question
from egopatch.extract.datasets.egosynth.places import places_of, scene_of
from egopatch.extract.datasets.egosynth.render import interval_of
from egopatch.extract.datasets.egosynth.scene import draw_scene
from egopatch.train.report.analysis import agreement
from egopatch.train.report.answers import Questions
from egopatch.train.report.sources import Selection

GRID, FRAMES = (7, 7), 4
SCENE = draw_scene(3, 12, "hard")
CLIP = interval_of(SCENE)


def cell(name: str, time: float) -> int:
    thing = SCENE.things_at(time)[name]
    return 7 * int(thing.y) + int(thing.x)


def selection(kept: np.ndarray, text: str) -> tuple[Selection, Questions]:
    question = Question("q", CLIP, text, "x", "open", ())
    return Selection({"q": 0}, kept[None].astype(np.int16)), Questions({"q": question}, {})


def test_scene_of_parses_the_scene_from_a_clip_id() -> None:
    assert scene_of(CLIP) == SCENE
    assert scene_of(interval_of(draw_scene(0, 5))) == draw_scene(0, 5)
    assert scene_of("k1|P1|10|95") is None


def test_named_objects_count_in_every_frame_and_described_ones_when_touched() -> None:
    name = SCENE.event("other").name
    named = places_of(SCENE, f"Where is the {name} at the end?", FRAMES, GRID)
    assert named.asked == tuple(frozenset({cell(name, (2 * t + 1) / 8)}) for t in range(FRAMES))
    second = places_of(SCENE, "Which is the object that the person touches second?", FRAMES, GRID)
    assert [len(patches) for patches in second.asked] == [0, 0, 1, 0]
    assert second.asked[2] == {cell(SCENE.event("second").name, 0.625)}
    assert all(len(patches) == 5 for patches in second.others)


def test_the_object_touched_next_is_asked_about_too() -> None:
    first, second = SCENE.event("first").name, SCENE.event("second").name
    found = places_of(SCENE, f"Which object does the person go to after the {first}?", FRAMES, GRID)
    assert found.asked[2] == {cell(first, 0.625), cell(second, 0.625)}
    assert found.asked[3] == {cell(first, 0.875)}


def test_agreement_of_a_perfect_and_of_a_blind_selection() -> None:
    text = f"where is the {SCENE.event('first').name} at the end?"
    places = places_of(SCENE, text, FRAMES, GRID)
    perfect = np.array([[*patches, 48] for patches in places.asked])
    found = agreement(*selection(perfect, text), GRID)
    assert found is not None
    assert (found.asked, found.others, found.precision) == (100, 0, 50)
    assert found.chance == 100 * 2 / 49
    everything = agreement(*selection(np.tile(np.arange(49), (FRAMES, 1)), text), GRID)
    assert everything is not None
    assert (everything.asked, everything.others, everything.chance) == (100, 100, 100)


def test_agreement_uses_only_the_frames_the_head_reads() -> None:
    scene = draw_scene(3, 9, "hard")  # its first object is moved between the 2nd and the 3rd of 16 frames
    text, stored, read = f"where is the {scene.event('first').name} at the end?", 16, [2, 6, 10, 14]
    places = places_of(scene, text, stored, GRID)
    assert places_of(scene, text, len(read), GRID).asked != tuple(places.asked[frame] for frame in read)
    kept = np.array([[*places.asked[frame]] for frame in read])
    question = Question("q", interval_of(scene), text, "x", "open", ())
    found = agreement(Selection({"q": 0}, kept[None].astype(np.int16)), Questions({"q": question}, {}), GRID, stored)
    assert found is not None
    assert (found.asked, found.precision) == (100, 100)


def test_other_data_sets_have_no_known_places() -> None:
    kept, questions = selection(np.zeros((FRAMES, 2)), "what?")
    other = Questions({"q": Question("q", "k1|P1|10|95", "what?", "x", "open", ())}, {})
    assert agreement(kept, other, GRID) is None
    assert agreement(kept, questions, GRID) is None
