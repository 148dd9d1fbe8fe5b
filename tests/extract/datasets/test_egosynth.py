import dataclasses
import fcntl
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import av
import numpy as np
import pytest

from egopatch.configs.schema import DataConfig
from egopatch.extract.__main__ import main
from egopatch.extract.datasets import load_dataset
from egopatch.extract.datasets.egosynth import render as module
from egopatch.extract.datasets.egosynth.frames import SKIN, frames
from egopatch.extract.datasets.egosynth.questions import drafts
from egopatch.extract.datasets.egosynth.render import FRAMES, interval_of, render
from egopatch.extract.datasets.egosynth.scene import OBJECTS, SETTINGS, SLOTS, Difficulty, draw_scene
from egopatch.extract.datasets.egotaskqa import read_questions

TAGS = {"world", "intent", "multi-agent", "descriptive", "predictive", "explanatory", "counterfactual"}
TAGS |= {"action", "object", "state", "change", "query", "verify", "direct", "indirect"}
CLIPS = 120
DIFFICULTIES: tuple[Difficulty, ...] = ("plain", "hard")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("egosynth")
    render(folder, clips=CLIPS, seed=3, workers=1)
    return folder


@pytest.mark.parametrize("split", ["direct", "indirect"])
def test_rendered_set_loads_as_egotaskqa(root: Path, split: str) -> None:
    dataset = load_dataset(DataConfig(root=root, split=split))  # type: ignore[arg-type]
    assert len(dataset.clips) == CLIPS
    assert all(clip.video.is_file() for clip in dataset.clips)
    assert sum(map(len, dataset.questions.values())) == round(7.5 * CLIPS)
    assert all(q.encoded == dataset.class_of(q.answer) for part in dataset.questions.values() for q in part)
    folder = root / "qa" / split
    assert set((folder / "all_reasoning_types.txt").read_text().split("\n")[:-1]) == TAGS
    assert {tag for part in dataset.questions.values() for q in part for tag in q.tags} == TAGS
    trained = {q.answer for q in dataset.questions["train"]}
    assert {q.answer for part in dataset.questions.values() for q in part} == trained


def test_every_question_has_a_paraphrase_and_a_counterfactual(root: Path) -> None:
    for split in ("direct", "indirect"):
        dataset = load_dataset(DataConfig(root=root, split=split, paraphrases=True))  # type: ignore[arg-type]
        asked = {question.text for part in dataset.questions.values() for question in part}
        for question in dataset.questions["train"]:
            assert question.variants is not None
            reworded, other = question.variants
            # A paraphrase that is a question of its own would give away its composition.
            assert reworded not in asked, reworded
            assert other != question.text
            # The paraphrase keeps what is asked about; the counterfactual changes it.
            names = [name for name in OBJECTS if name in question.text]
            assert [name for name in OBJECTS if name in reworded] == names
            words = {"first", "second", "next", "red", "blue", "green", "yellow", "purple", "cyan"}
            pieces = [[w for w in re.findall("[a-z]+", t) if w in words] for t in (question.text, reworded, other)]
            assert pieces[1] == pieces[0]
            assert pieces[2] != pieces[0]


def test_splits_follow_the_released_rules(root: Path) -> None:
    parts = {part: read_questions(root / f"qa/direct/formatted_{part}_qas_encode.json") for part in ("train", "test")}
    assert len(parts["train"]) == pytest.approx(3 * len(parts["test"]), rel=0.1)
    ids = {"train": Counter(q.answer for q in parts["train"]), "test": Counter(q.answer for q in parts["test"])}
    assert all(abs(ids["train"][answer] - 3 * count) <= 6 for answer, count in ids["test"].items())
    for part, references in (("train", {"direct", "indirect"}), ("val", {"indirect"}), ("test", {"indirect"})):
        records = json.loads((root / f"qa/indirect/formatted_{part}_qas_encode.json").read_text())
        assert {record["reference"] for record in records} == references
        hoi = [r["program"].startswith("query([hoi], iterate_until(") for r in records if r["reference"] == "indirect"]
        assert all(hoi) if part == "train" else not any(hoi)
        for record in records:
            tags = [*record["type"], *record["category"]]
            tags += [record["semantic"], record["structural"], record["reference"]]
            assert record["reasoning_type"] == "$".join(tags)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_question_text_alone_predicts_answers_poorly(difficulty: Difficulty) -> None:
    """Even the best text-only answer to each question, chosen with knowledge of the truth, stays near chance."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(1500):
        for draft in drafts(draw_scene(5, index, difficulty), 8):
            by_text[draft.text][draft.answer] += 1
    common = {text: answers for text, answers in by_text.items() if answers.total() >= 60}
    assert len(common) > 40
    right = sum(max(answers.values()) for answers in common.values())
    assert right / sum(answers.total() for answers in common.values()) < 0.38
    for text, answers in common.items():
        assert max(answers.values()) / answers.total() < 0.75, text


def test_answers_agree_with_the_event_log(root: Path) -> None:
    log = {(event := json.loads(line))["interval"]: event for line in (root / "events.jsonl").read_text().splitlines()}
    words = {"first": "touches first?", "second": "touches second?", "next": "touch next?", "other": "person holds?"}
    asked = 0
    for part in ("train", "val", "test"):
        for question in read_questions(root / f"qa/direct/formatted_{part}_qas_encode.json"):
            for event in log[question.clip_id]["events"]:
                if question.text.startswith("Which") and question.text.endswith(words[event["slot"]]):
                    asked += 1
                    assert question.answer == event["object"], question
                if question.text == f"What does the person do to the {event['object']}?":
                    asked += 1
                    assert question.answer == event["action"], question
    assert asked > 200


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_order_and_position_answers_agree_with_the_scene(difficulty: Difficulty) -> None:
    asked: Counter[str] = Counter()
    for index in range(300):
        scene = draw_scene(2, index, difficulty)
        first, second, target = (scene.event(slot).name for slot in ("first", "second", "next"))  # type: ignore[arg-type]
        follows = {first: second, second: target, "object that the person touches first": second}
        follows["object that the person touches second"] = target
        for draft in drafts(scene, 8):
            if draft.text.startswith("which object does the person go to after the "):
                asked["after"] += 1
                assert draft.answer == follows[draft.text.split(" after the ")[1].rstrip("?")]
            if draft.text.startswith("where is it at the end that the other person holds"):
                asked["where"] += 1
                x = scene.at_end(scene.event("other").name).x
                assert draft.answer == ("left" if x < 7 / 3 else "middle" if x < 14 / 3 else "right")
            if draft.text == "how does it change that the person touches second?":
                asked["change"] += 1
                assert (scene.event("second").action == "lift") == (draft.answer == "from low to high")
    assert asked["where"] > 5
    assert asked["change"] > 5
    assert (asked["after"] > 100) == (difficulty == "hard")


def test_hard_scenes_equal_plain_scenes_except_for_their_ids() -> None:
    hard, plain = draw_scene(4, 9, "hard"), draw_scene(4, 9)
    assert (hard.things, hard.events, hard.moves) == (plain.things, plain.events, plain.moves)
    assert interval_of(hard) == "egosynth-hard-4-000009|P1|0|24"


def test_bystanders_change_only_the_area_behind_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their hands have the person's colour and hold the objects' colours, and only the wall shows them."""
    scene = draw_scene(4, 2, "hard")
    crowded = np.stack(list(frames(scene, 8, 112)))
    monkeypatch.setitem(SETTINGS, "hard", dataclasses.replace(SETTINGS["hard"], bystanders=0))
    quiet = np.stack(list(frames(scene, 8, 112)))
    changed = (crowded != quiet).any(axis=-1)
    assert changed.any(axis=(1, 2)).all()
    rows = np.nonzero(changed.any(axis=(0, 2)))[0]
    assert rows.max() < 2 * 112 / 7
    colours = {tuple(pixel) for pixel in crowded[changed].tolist()}
    assert SKIN in colours
    assert colours & set(OBJECTS.values())


def test_hard_setting_stops_the_hand_short_of_its_next_target() -> None:
    """In the last frame the plain hand is behind its target; the hard one shows more of the table around it."""
    for difficulty, held in (("plain", True), ("hard", False)):
        above = []
        for index in range(40):
            scene = draw_scene(6, index, difficulty)  # type: ignore[arg-type]
            target = scene.at_end(scene.event("next").name)
            picture = list(frames(scene, 8, 112))[-1]
            radius = 0.64 * scene.setting.scale  # between the object's edge and the hand's
            x, y = int(target.x * 16), int((target.y - radius) * 16)
            above.append(tuple(picture[y, x]) == SKIN)
        assert (np.mean(above) > 0.6) == held, difficulty


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_scene_holds_together(difficulty: Difficulty) -> None:
    for index in range(200):
        scene = draw_scene(0, index, difficulty)
        assert {thing.name for thing in scene.things} == set(OBJECTS)
        assert len({event.name for event in scene.events}) == len(SLOTS)
        for event in scene.events:
            before, after = scene.things_at(0.0)[event.name], scene.at_end(event.name)
            if event.action in ("open", "close"):
                assert (before.is_open, after.is_open) == (event.action == "close", event.action == "open")
            elif event.action == "move":
                assert abs(after.x - before.x) == pytest.approx(1)
            else:
                assert (before.x, before.is_open, after.height) == (after.x, after.is_open, 0)
        assert all(0 < thing.x < 7 and 1.9 < thing.y < 7 for thing in scene.things_at(1.0).values())


def test_videos_are_h264_and_decode(root: Path) -> None:
    paths = sorted((root / "qa_videos").iterdir())
    assert len(paths) == CLIPS
    assert paths[0].name == "egosynth-3-000000|P1|0|24.mp4"
    for path in paths[:3]:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.width, stream.codec_context.height) == (
                "h264",
                128,
                128,
            )
            assert float(stream.average_rate) == 12
            assert sum(1 for _ in container.decode(stream)) == FRAMES


def test_relative_output_folder_follows_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering processes are reused by the next call and keep the working directory of the first."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        render(Path("data"), clips=20)
        assert len(list((tmp_path / name / "data" / "qa_videos").iterdir())) == 20


def test_smaller_set_in_the_same_folder_leaves_no_video_of_the_larger_one(tmp_path: Path) -> None:
    assert render(tmp_path, clips=21, workers=1) == 0
    (tmp_path / "qa_videos" / "mine.mp4").touch()
    assert render(tmp_path, clips=20, workers=1) == 1
    names = {path.name for path in (tmp_path / "qa_videos").iterdir()}
    assert names == {"mine.mp4", *(f"egosynth-0-{number:06d}|P1|0|24.mp4" for number in range(20))}


def test_the_command_says_that_another_set_was_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synth = ["synth", "--out", str(tmp_path), "--clips", "20"]
    note = f"note: {tmp_path} held another EgoSynth set, which was replaced; removed 20 old videos\n"
    for more, replaced in ((["--hard"], False), (["--hard"], False), ([], True)):
        assert main([*synth, *more]) == 0
        assert (note in capsys.readouterr().err) == replaced


def test_hard_set_is_reproducible_and_loads_as_egotaskqa(tmp_path: Path) -> None:
    for name in ("one", "other"):
        render(tmp_path / name, clips=20, seed=3, difficulty="hard", workers=1)
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*")} for name in ("one", "other")
    )
    assert one == other
    for split in ("direct", "indirect"):
        dataset = load_dataset(DataConfig(root=tmp_path / "one", split=split))  # type: ignore[arg-type]
        assert len(dataset.clips) == 20
        assert all(clip.clip_id.startswith("egosynth-hard-3-") for clip in dataset.clips)


def test_same_arguments_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    render(tmp_path, clips=CLIPS, seed=3, workers=2, progress=lambda clips, total: done.append((clips, total)))
    assert done[-1] == (CLIPS, CLIPS)
    files = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert all((root / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_scene_questions_do_not_depend_on_how_many_are_drawn() -> None:
    assert drafts(draw_scene(1, 7), 5) == drafts(draw_scene(1, 7), 9)[:5]
    assert draw_scene(1, 7) != draw_scene(2, 7)
    assert interval_of(draw_scene(1, 7)) == "egosynth-1-000007|P1|0|24"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"clips": 3}, "clips is 3; expected at least 20"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0"),
        ({"size": 33}, "size is 33; expected an even number of pixels from 64 to 1024"),
        ({"clips": 30, "questions": 5}, "questions is 5; expected 3 to 16 per clip, which is 90 to 480"),
        ({"difficulty": "easy"}, "difficulty is 'easy'; expected one of plain, hard"),
        ({"workers": 0}, "workers is 0; expected at least 1"),
    ],
)
def test_out_of_range_arguments_are_refused(tmp_path: Path, argument: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(tmp_path, **argument)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_multiple_choice_set_does_not_give_answers_away(root: Path) -> None:
    dataset = load_dataset(DataConfig("jsonl", root, clips="choice/clips.jsonl", questions="choice/questions.jsonl"))
    assert len(dataset.clips) == CLIPS
    assert all(clip.video.is_file() for clip in dataset.clips)
    for part in ("train", "test"):
        questions = dataset.questions[part]  # type: ignore[index]
        counts = Counter(question.answer_index for question in questions)
        assert max(counts.values()) - min(counts.values()) <= 1
        for question in questions:
            assert len(question.options) == 5
            assert not any(option in question.text for option in question.options)
    ids = {part: {q.question_id for q in qs} for part, qs in dataset.questions.items()}
    direct = load_dataset(DataConfig(root=root, split="direct"))
    for part, questions in direct.questions.items():
        assert ids[part] == {q.question_id for q in questions if q.answer in OBJECTS}


def test_another_data_set_is_not_overwritten(tmp_path: Path) -> None:
    answers = tmp_path / "Data" / "qa" / "direct" / "answer_set.txt"
    answers.parent.mkdir(parents=True)
    answers.write_text("fridge\n")
    with pytest.raises(
        ValueError, match=r"which holds another data set \(.*Data/qa\); choose a folder for EgoSynth alone"
    ):
        render(tmp_path, clips=20)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [answers]


def test_two_renderers_of_one_folder_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one removes the other's videos, and both write the same temporary files."""
    held: list[bool] = []

    def write_annotations(root: Path, *_: object) -> None:
        with (root / module.LOCK).open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(True)

    monkeypatch.setattr(module, "_write_annotations", write_annotations)
    monkeypatch.setattr(module.joblib, "Parallel", lambda **_: lambda jobs: ())
    render(tmp_path / "set", clips=20, workers=1)
    assert held == [True]
