"""What the rows of clips were made of: a stretch of a video file."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from egopatch.features.io.fields import MalformedRecord, Record, get_list


@dataclass(frozen=True, slots=True)  # there may be millions
class Origin:
    """The stretch of video that a row was made of; the hash of the file is the row's `source`.

    Attributes:
        file: Name of the file, relative to the data set's folder.
        size: Size of the file in bytes.
        start_s: First second of the clip; None is the video's start.
        end_s: Last second of the clip; None is the video's end.
    """

    file: str
    size: int
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class OriginColumns:
    """The origins of a commit's clips, as columns: a reader may hold millions of clips in memory.

    Attributes:
        files: Name and size of each file, once.
        file: Index into `files` of each clip; -1 where an earlier version stored the clip without its origin.
        bounds_s: Start and end of each clip, one after the other; NaN is None.
    """

    files: tuple[tuple[str, int], ...]
    file: "array[int]"
    bounds_s: "array[float]"

    def at(self, index: int) -> Origin | None:
        """The origin of one clip; None where it was not recorded."""
        file = self.file[index]
        if file < 0:
            return None
        start, end = self.bounds_s[2 * index : 2 * index + 2]
        return Origin(*self.files[file], None if math.isnan(start) else start, None if math.isnan(end) else end)


def origins_record(origins: Sequence[Origin | None]) -> Record:
    """The columns as a line of the ledger holds them."""
    known = [origin for origin in origins if origin is not None]
    numbers = {file: number for number, file in enumerate(dict.fromkeys((o.file, o.size) for o in known))}
    return {
        "names": [name for name, _ in numbers],
        "sizes": [size for _, size in numbers],
        "files": [None if origin is None else numbers[origin.file, origin.size] for origin in origins],
        "start_s": [None if origin is None else origin.start_s for origin in origins],
        "end_s": [None if origin is None else origin.end_s for origin in origins],
    }


def parse_origins(record: Record, clips: int) -> OriginColumns:
    """The columns that `origins_record` wrote for that many clips.

    Raises:
        MalformedRecord: A field is missing, or has a value that `origins_record` never writes.
    """
    names, sizes = get_list(record, "names", str), get_list(record, "sizes", int)
    files = [-1 if number is None else number for number in get_list(record, "files", int, type(None))]
    start_s, end_s = (get_list(record, name, float, type(None)) for name in ("start_s", "end_s"))
    complete = len(names) == len(sizes) and len(files) == len(start_s) == len(end_s) == clips
    if not complete or min(files) < -1 or max(files) >= len(names):
        raise MalformedRecord(f"'origins' is {record!r:.60}; expected a file, a start and an end for {clips} clips")
    bounds_s = array("d", bytes(16 * clips))
    for first, column in enumerate((start_s, end_s)):
        bounds_s[first::2] = array("d", [math.nan if second is None else second for second in column])
    return OriginColumns(tuple(zip(names, sizes, strict=True)), array("i", files), bounds_s)
