"""EgoSynth: a procedurally rendered data set in EgoTaskQA's file layout, to run the whole pipeline without any data.

`render` writes what the `egotaskqa` adapter reads: `qa/{direct,indirect}/formatted_{train,val,test}_qas_encode.json`,
`answer_set.txt`, `all_reasoning_types.txt` and real H.264 files `qa_videos/INTERVAL.mp4`; beside them a multiple-choice
set, `choice/{clips,questions}.jsonl`, and the generator's own event log, `events.jsonl`. The same arguments give the
same bytes.

`scene` draws what happens, `frames` draws the pictures, and `questions` writes the questions and both splits. The set
is synthetic and small: results on it show that a pipeline works, not how well a system answers questions about real
video.
"""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import joblib
import numpy as np

from egopatch.extract.datasets.egosynth.frames import frames
from egopatch.extract.datasets.egosynth.questions import Record, drafts
from egopatch.extract.datasets.egosynth.scene import SETTINGS, Difficulty, Scene, draw_scene, rng_of
from egopatch.extract.datasets.egosynth.splits import multiple_choice, split_direct, split_indirect
from egopatch.extract.datasets.egotaskqa import ANNOTATION_FOLDERS, ANSWER_SET, FILE_NAMES, VIDEO_FOLDER
from egopatch.extract.datasets.records import PARTS, Part, answer_vocabulary
from egopatch.features.common.signals import blocked_in_children, start_trackers
from egopatch.features.io.files import locked, make_folder, write_file

FPS = 12
SECONDS = 2
FRAMES = FPS * SECONDS
QUESTIONS_PER_CLIP = 7.5
MIN_CLIPS = 20
TAGS_FILE = "all_reasoning_types.txt"
EVENTS_FILE = "events.jsonl"
LOCK = ".egosynth.lock"
CHOICE_FOLDER = "choice"  # the multiple-choice set, in the layout `jsonl`


def render(
    root: Path,
    *,
    clips: int = 1000,
    seed: int = 0,
    size: int = 128,
    questions: int | None = None,
    difficulty: Difficulty = "plain",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the set under `root`, in place of such a set that is there; another process that does so is waited for.

    Args:
        root: Folder to write to, created if it is missing.
        clips: Number of clips, of two seconds each.
        seed: Seed of everything that is drawn; clip `i` is the same for every number of clips.
        size: Side of the picture in pixels, even.
        questions: Total number of questions; None means 7.5 per clip.
        difficulty: `plain` or `hard`; see `scene.SETTINGS`.
        workers: Number of processes that render and encode.
        progress: Called with the number of clips done and the total.

    Returns:
        Number of videos of the earlier set that this set does not have, and that were therefore removed.

    Raises:
        ValueError: An argument is out of range, or `root` holds another data set; the message names it.
    """
    questions = round(QUESTIONS_PER_CLIP * clips) if questions is None else questions
    _check(clips, seed, size, questions, workers)
    if difficulty not in SETTINGS:
        raise ValueError(f"difficulty is {difficulty!r}; expected one of {', '.join(SETTINGS)}")
    others = [root / name for name in ANNOTATION_FOLDERS if (root / name).exists()]
    if others and not (root / EVENTS_FILE).exists():
        raise ValueError(
            f"out is {str(root)!r}, which holds another data set ({others[0]}); choose a folder for EgoSynth alone"
        )
    scenes = [draw_scene(seed, index, difficulty) for index in range(clips)]
    make_folder(root)
    with locked(root / LOCK):
        _write_annotations(root, scenes, questions, seed)
        videos = (root / VIDEO_FOLDER).absolute()  # joblib may reuse processes with another working folder
        videos.mkdir(parents=True, exist_ok=True)
        named = {_video_name(scene) for scene in scenes}
        removed = [path for path in videos.glob("egosynth-*.mp4") if path.name not in named]
        for old in removed:
            old.unlink()
        bounds = [*range(0, clips, max(1, min(25, clips // (4 * workers)))), clips]
        jobs = (joblib.delayed(_write_clips)(videos, scenes[first:last], size) for first, last in pairwise(bounds))
        done = 0
        start_trackers()
        with blocked_in_children(signal.SIGINT):
            each_written = joblib.Parallel(n_jobs=workers, return_as="generator_unordered")(jobs)
        for written in each_written:
            done += written
            if progress is not None:
                progress(done, clips)
    return len(removed)


def interval_of(scene: Scene) -> str:
    """The clip's name in EgoTaskQA's form: video, person, first and last frame."""
    family = "egosynth" if scene.difficulty == "plain" else f"egosynth-{scene.difficulty}"
    return f"{family}-{scene.seed}-{scene.index:06d}|P1|0|{FRAMES}"


def _video_name(scene: Scene) -> str:
    return f"{interval_of(scene)}.mp4"


def write_video(path: Path, pictures: Sequence[np.ndarray], fps: int = FPS) -> None:
    """Encode uint8 [H, W, 3] pictures as an H.264 mp4, on one thread, so that equal pictures give equal bytes."""
    partial = path.with_name(f".{path.name}.part")
    height, width = pictures[0].shape[:2]
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "veryfast", "crf": "20", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)


def _check(clips: int, seed: int, size: int, questions: int, workers: int) -> None:
    for name, value, expected, fits in (
        ("clips", clips, f"at least {MIN_CLIPS}, so that every part of both splits has questions", clips >= MIN_CLIPS),
        ("seed", seed, "a whole number from 0", seed >= 0),
        ("size", size, "an even number of pixels from 64 to 1024", 64 <= size <= 1024 and size % 2 == 0),
        (
            "questions",
            questions,
            f"3 to 16 per clip, which is {3 * clips} to {16 * clips}",
            3 * clips <= questions <= 16 * clips,
        ),
        ("workers", workers, "at least 1", workers >= 1),
    ):
        if not fits:
            raise ValueError(f"{name} is {value}; expected {expected}")


def _write_clips(folder: Path, scenes: Sequence[Scene], size: int) -> int:
    for scene in scenes:
        write_video(folder / _video_name(scene), list(frames(scene, FRAMES, size)))
    return len(scenes)


def _write_annotations(root: Path, scenes: Sequence[Scene], questions: int, seed: int) -> None:
    # Written first, because this file marks the folder as EgoSynth's.
    _write(root / EVENTS_FILE, "".join(f"{json.dumps(_events(scene))}\n" for scene in scenes))
    records: list[Record] = []
    for scene in scenes:
        count = (scene.index + 1) * questions // len(scenes) - scene.index * questions // len(scenes)
        for draft in drafts(scene, count):
            records.append(draft.record(len(records), scene.index, interval_of(scene)))
    splits = {
        "direct": split_direct(records, rng_of(seed, 0, 3)),
        "indirect": split_indirect(records, rng_of(seed, 0, 4)),
    }
    for split, parts in splits.items():
        _write_split(root / ANNOTATION_FOLDERS[0] / split, parts)
    _write_choices(root, splits["direct"], scenes, rng_of(seed, 0, 5))


def _write_choices(
    root: Path, parts: Mapping[Part, Sequence[Record]], scenes: Sequence[Scene], rng: np.random.Generator
) -> None:
    folder = root / CHOICE_FOLDER
    names = [interval_of(scene) for scene in scenes]
    clips = [{"clip_id": name, "video": f"{VIDEO_FOLDER}/{name}.mp4"} for name in names]
    questions = [line for part in PARTS for line in multiple_choice(parts[part], part, rng)]
    for file, lines in (("clips.jsonl", clips), ("questions.jsonl", questions)):
        _write(folder / file, "".join(f"{json.dumps(line)}\n" for line in lines))


def _write_split(folder: Path, parts: Mapping[Part, Sequence[Record]]) -> None:
    answers = answer_vocabulary([record["answer"] for record in parts["train"]])
    classes = {answer: index for index, answer in enumerate(answers)}
    tags: dict[str, None] = {}
    for part in ("train", "test", "val"):
        encoded = [{**record, "answer_encode": classes.get(record["answer"], 1)} for record in parts[part]]
        tags |= dict.fromkeys(tag for record in encoded for tag in record["reasoning_type"].split("$"))
        _write(folder / FILE_NAMES[0].format(part=part), json.dumps(encoded, indent=0))
    _write(folder / ANSWER_SET, "".join(f"{answer}\n" for answer in answers))
    _write(folder / TAGS_FILE, "".join(f"{tag}\n" for tag in tags))


def _events(scene: Scene) -> Record:
    """Event log of a clip: times in seconds, positions in cells of the 7x7 grid from the top left corner."""
    return {
        "interval": interval_of(scene),
        "things": [{"name": t.name, "x": round(t.x, 3), "y": round(t.y, 3), "open": t.is_open} for t in scene.things],
        "events": [
            {
                "slot": e.slot,
                "object": e.name,
                "action": e.action,
                "start_s": e.start * SECONDS,
                "end_s": e.end * SECONDS,
            }
            for e in scene.events
        ],
    }


def _write(path: Path, text: str) -> None:
    write_file(path, text.encode())
