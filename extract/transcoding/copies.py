"""Copies a data set so that each clip is a small file of its own; an interrupted job resumes where it stopped.

The journal `transcoded.jsonl` names each verified copy, with the video, size and stretch that it was made from. A copy
is made again if one of these has changed, or if its own file is gone or has another size.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from egopatch.configs.schema import Config, ConfigError, DataConfig
from egopatch.extract.datasets import Clip, load_dataset
from egopatch.extract.datasets.egotaskqa import ANNOTATION_FOLDERS, VIDEO_FOLDER
from egopatch.extract.datasets.folder import format_clips
from egopatch.extract.feed.pool import DecodePool, UndecodedClip, decoder_count
from egopatch.extract.transcoding.segment import SETTINGS, Segment, write_segment
from egopatch.features.common.progress import ProgressDisplay
from egopatch.features.io.files import append_synced, locked, make_folder, read_at, write_file

JOURNAL = "transcoded.jsonl"
JSONL_VIDEOS = "videos"
SLOWER = 30  # times `video.timeout_s`, because all frames of a clip are decoded and encoded


@dataclass(frozen=True)
class Transcoded:
    """The result of a job.

    Attributes:
        made: Copies that this job made.
        kept: Number of copies that already existed.
        failed: Id of each clip that has no copy -> reason.
    """

    made: tuple[Segment, ...]
    kept: int
    failed: dict[str, str]


def transcode(config: Config, out: Path) -> Transcoded:
    """Write a copy of each clip, and the annotations, to `out`, so that `--data.root OUT` is the same data set.

    Raises:
        DatasetError: As `extract.datasets.load_dataset`.
        ConfigError: The layout of the data set is not known here; `out` is the data set itself; or its files are not
            within its folder.
    """
    data = config.data
    if data.name not in ("egotaskqa", "jsonl"):
        raise ConfigError(f"data.name is {data.name}; expected egotaskqa or jsonl, the layouts that transcode can copy")
    if out.resolve() == data.root.resolve():
        raise ConfigError(f"--out is {out}, which is data.root; give another folder")
    _require_within(data, out)
    clips = load_dataset(data).clips
    folder = out / (VIDEO_FOLDER if data.name == "egotaskqa" else JSONL_VIDEOS)
    make_folder(folder)
    made: list[Segment] = []
    failed: dict[str, str] = {}
    with locked(out / JOURNAL) as journal:
        known = _read(journal)
        todo = [clip for clip in clips if not _is_copied(clip, known.get(clip.clip_id), folder)]
        # Killed jobs leave unfinished copies; a finished one does not have such a name.
        for unfinished in folder.rglob(".*.mp4.*"):
            unfinished.unlink()
        video = replace(config.video, decoder="pyav", timeout_s=SLOWER * config.video.timeout_s)
        with (
            DecodePool(video, decoder_count(config, 1), partial(write_segment, folder=folder)) as pool,
            ProgressDisplay("transcode", len(todo), "clips") as display,
        ):
            for clip, result in zip(todo, pool.map(todo), strict=True):
                if isinstance(result, UndecodedClip):
                    failed[result.clip.clip_id] = result.reason
                else:
                    made.append(result)
                    append_synced(journal, json.dumps(_made_of(clip) | asdict(result)).encode() + b"\n")
                display.advance(1)
        _write_annotations(config, out, clips, _read(journal))
    return Transcoded(tuple(made), len(clips) - len(todo), failed)


def _require_within(data: DataConfig, out: Path) -> None:
    """Check that the copied annotations stay within `out`: a path that leads out of it may be the original's."""
    files = {"data.clips": data.clips, "data.questions": data.questions} if data.name == "jsonl" else {}
    for option, name in files.items():
        if name is not None and not (out / name).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"{option} is {name!r}, which is outside data.root; expected a file in data.root, because the copy "
                "keeps its name: move the file there"
            )


def _made_of(clip: Clip) -> dict[str, object]:
    size = clip.video.stat().st_size if clip.video.is_file() else None
    return {
        "video": str(clip.video.absolute()), "video_size": size, "start_s": clip.start_s, "end_s": clip.end_s,
        "settings": SETTINGS,
    }  # fmt: skip


def _is_copied(clip: Clip, record: dict[str, object] | None, folder: Path) -> bool:
    copy = folder / f"{clip.clip_id}.mp4"
    if record is None or not copy.is_file() or copy.stat().st_size != record.get("size"):
        return False
    now = _made_of(clip)
    if now["video_size"] is None:  # a copy stays valid when its video is gone
        now["video_size"] = record.get("video_size")
    return all(record.get(name) == value for name, value in now.items())


def _read(journal: int) -> dict[str, dict[str, object]]:
    """The last record of each clip; a line that a crash cut short is terminated and ignored."""
    content = read_at(journal, os.fstat(journal).st_size, 0)
    if content and not content.endswith(b"\n"):
        append_synced(journal, b"\n")
    records = {}
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["clip_id"]] = record
    return records


def _write_annotations(
    config: Config, out: Path, clips: Sequence[Clip], records: Mapping[str, Mapping[str, Any]]
) -> None:
    data = config.data
    if data.name == "egotaskqa":
        for name in ANNOTATION_FOLDERS:
            if (data.root / name).is_dir():
                shutil.copytree(data.root / name, out / name, dirs_exist_ok=True)
        return
    # An end beyond that of the copy is kept: `extract run` notes it, as it does for the video.
    copied = [
        Clip(c.clip_id, Path(JSONL_VIDEOS, f"{c.clip_id}.mp4"), end_s=records.get(c.clip_id, {}).get("clip_end_s"))
        for c in clips
    ]
    files = {data.clips: format_clips(copied).encode()}
    if data.questions is not None:
        files[data.questions] = (data.root / data.questions).read_bytes()
    for name, content in files.items():
        write_file(out / name, content)
