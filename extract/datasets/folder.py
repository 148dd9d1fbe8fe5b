"""Your own videos without annotations: the video files of a folder, cut into clips of about equal length."""

import errno
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from egopatch.extract.datasets import parsing
from egopatch.extract.datasets.records import Clip, DatasetError
from egopatch.features.io.walk import files_below, is_file_or_lost

SUFFIXES = (
    ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
    ".ts", ".vob", ".webm", ".wmv",
)  # fmt: skip
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst")


def find_videos(folder: Path) -> dict[str, Path]:
    """The video files in `folder` and the folders below it, sorted: path relative to `folder` -> file.

    Files and folders whose names begin with a dot are skipped. Links to folders are followed, but a folder that several
    paths lead to is read by one of them: by the path without a link, if there is one. If `folder` is a video file, it
    is the only one.

    Raises:
        DatasetError: There is no video, or a video's name cannot be part of a clip_id (one line per file), or `folder`
            is an archive.
        OSError: A folder cannot be read.
    """
    if folder.is_file() and folder.suffix.lower() in ARCHIVES:
        raise DatasetError([f"{folder}: is an archive; unpack it, and name the folder with the videos"])
    if folder.is_file():
        found = {folder.name: folder}
    elif folder.is_dir():
        paths = [path for path in files_below(folder, hidden=False) if path.suffix.lower() in SUFFIXES]
        found = {path.relative_to(folder).as_posix(): path for path in sorted(paths) if is_file_or_lost(path)}
    else:
        what = "is neither a file nor a folder" if folder.exists() else "no such file or folder"
        raise DatasetError([f"{folder}: {what}; expected a folder with videos, or a video"])
    if not found:
        raise DatasetError([f"{folder}: contains no video; expected files that end in {', '.join(SUFFIXES)}"])
    if problems := [line for name, path in found.items() for line in _problems_of(name, path)]:
        raise DatasetError(problems)
    return found


def names_in(folder: Path) -> Mapping[str, str]:
    """Names of files in a folder by what `parsing.compared` makes of them; none if it cannot be read."""
    with suppress(OSError):
        return {parsing.compared(file.name): file.name for file in folder.iterdir()}
    return {}


def missing_hint(video: Path, names: Mapping[str, str]) -> str | None:
    """What explains that there is no file `video`, to follow its name, and the remedy; None if nothing does.

    Args:
        video: The path.
        names: `names_in` of its folder.
    """
    if video.is_symlink() and not video.exists():
        try:
            video.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                return "is a link that leads back to itself; make it a link to a video"
        return (
            f"is a link to {video.readlink()}, which does not exist; fetch that file (with git-annex: `git annex get`),"
            " or correct the link"
        )
    near = names.get(parsing.compared(video.name))
    if near is not None and near != video.name:
        return f"does not exist, but {near!a} is there; use one spelling in both places"  # they may look the same
    return None


def _problems_of(name: str, path: Path) -> list[str]:
    try:
        parsing.clip_path_field({"name": name}, "name")
    except ValueError as error:
        return [f"{str(path)!r}: cannot be the name of a clip ({error}); rename the file"]
    return []


def cut(name: str, video: Path, duration_s: float | None, clip_s: float | None) -> list[Clip]:
    """The clips of one video.

    All clips but the last are `clip_s` long. The last one ends with the video; a remainder of less than half of
    `clip_s` is added to it, so that no clip is much shorter than the others.

    Args:
        name: Beginning of the clip ids; the whole id of a clip that is the whole video.
        video: The file.
        duration_s: Its length in seconds; None if it cannot be decoded, which makes it one clip.
        clip_s: Length of a clip in seconds; None makes each video one clip.
    """
    count = 1 if duration_s is None or clip_s is None else max(1, int(duration_s / clip_s + 0.5))
    if count == 1:
        return [Clip(name, video)]
    assert clip_s is not None
    edges = [round(number * clip_s, 6) for number in range(count)]
    ends: Sequence[float | None] = [*edges[1:], None]
    return [Clip(f"{name}@{start:.12g}s", video, start, end) for start, end in zip(edges, ends, strict=True)]


def format_clips(clips: Iterable[Clip]) -> str:
    """The clips as the JSON lines that `extract.datasets.jsonl` reads."""
    return "".join(f"{json.dumps(_record(clip))}\n" for clip in clips)


def _record(clip: Clip) -> dict[str, object]:
    record = {"clip_id": clip.clip_id, "video": str(clip.video), "start_s": clip.start_s, "end_s": clip.end_s}
    return {key: value for key, value in record.items() if value is not None}
