"""Checks whether the rows of a store were made from what the annotations say now.

A clip is *stale* if its row was made from another stretch, from another file, or from a file whose size has changed. A
file that is gone does not make a clip stale. Bytes are compared by `egopatch features verify STORE --sources FOLDER`,
since reading every video takes long; modification times are not compared, since copying may change them.
"""

import functools
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from egopatch.configs.experiment_line import UNNAMED
from egopatch.extract.datasets.records import Clip
from egopatch.features.common.units import counted
from egopatch.features.state.origin import Origin

SHOWN = 3
REFRESH = f"egopatch extract run {UNNAMED} --refresh"


@dataclass(frozen=True)
class OriginCheck:
    """The stored clips of a data set, compared with its annotations.

    Attributes:
        stale: Id -> how the row differs from the annotations, for each stale clip.
        unrecorded: Number of clips stored without an origin: imported, or stored by an earlier version.
    """

    stale: Mapping[str, str]
    unrecorded: int

    def stale_line(self) -> str:
        """How many clips are stale, the first few of them, and what to do."""
        first = "; ".join(f"{clip_id} ({difference})" for clip_id, difference in islice(self.stale.items(), SHOWN))
        more = f"; and {len(self.stale) - SHOWN} more" if len(self.stale) > SHOWN else ""
        return (
            f"{counted(len(self.stale), 'clip is', 'clips are')} stale: {first}{more}; run `{REFRESH}` to encode them "
            "again, or use another store.path if the store holds another data set"
        )

    def lines(self) -> list[str]:
        """The lines that a command prints about the check; none if every row is known to match."""
        stale = [self.stale_line()] if self.stale else []
        return stale + ([f"note: {unrecorded_line(self.unrecorded)}"] if self.unrecorded else [])


def unrecorded_line(clips: int) -> str:
    """One line about `clips` clips without an origin, which were imported or stored by an earlier version."""
    return (
        f"{counted(clips, 'clip')} came without stretch and video file, from `features import` or an earlier version, "
        "and cannot be compared with the annotations"
    )


def others_line(clips: int) -> str:
    """One line about `clips` clips of a store that the annotations do not name, such as those of an earlier set."""
    return f"the store also has {counted(clips, 'clip')} that these annotations do not name"


def origin_of(clip: Clip, root: Path, size: int) -> Origin:
    """The origin of a row of `clip`, whose video has `size` bytes; `root` is `data.root`."""
    start_s, end_s = (None if second is None else float(second) for second in (clip.start_s, clip.end_s))
    return Origin(_file_name(clip.video, root), size, start_s, end_s)


def compare_origins(clips: Iterable[Clip], root: Path, origins: Mapping[str, Origin | None]) -> OriginCheck:
    """Compare `clips` with the origins of their rows; `root` is `data.root`. Clips without a row are skipped."""

    @functools.cache  # many clips share a video
    def file_now(video: Path) -> tuple[str, int | None]:
        return _file_name(video, root), _size(video)

    stale: dict[str, str] = {}
    unrecorded = 0
    for clip in clips:
        origin = origins.get(clip.clip_id)
        if origin is not None:
            if difference := _difference(clip, origin, *file_now(clip.video)):
                stale[clip.clip_id] = difference
        elif clip.clip_id in origins:
            unrecorded += 1
    return OriginCheck(stale, unrecorded)


def _difference(clip: Clip, origin: Origin, file: str, size: int | None) -> str | None:
    if file != origin.file:
        return f"video is {file} now, but its row was made from {origin.file}"
    if (clip.start_s, clip.end_s) != (origin.start_s, origin.end_s):
        now, then = _stretch(clip.start_s, clip.end_s), _stretch(origin.start_s, origin.end_s)
        return f"stretch is {now} now, but its row was made from {then}"
    if size is not None and size != origin.size:
        return f"{file} has {size} bytes now, but had {origin.size} bytes when its row was made"
    return None


def _stretch(start_s: float | None, end_s: float | None) -> str:
    start, end = "start" if start_s is None else f"{start_s:.12g} s", "end" if end_s is None else f"{end_s:.12g} s"
    return f"{start} to {end}"


def _file_name(video: Path, root: Path) -> str:
    # Ten times as fast as `Path.relative_to`; neither looks at the disk.
    return video.as_posix().removeprefix(f"{root.as_posix().rstrip('/')}/")


def _size(video: Path) -> int | None:
    """Size of a video file; None where it is gone or cannot be looked at."""
    try:
        status = video.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
