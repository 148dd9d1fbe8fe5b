"""The origin of a clip's row: the stretch of a video file that it was made from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from egopatch.features.common.units import counted
from egopatch.features.values.errors import DamagedStore

_SECONDS = (float, type(None))


@dataclass(frozen=True, slots=True)  # there may be millions
class Origin:
    """The stretch of video that a row was made from; the hash of the file is the row's `source`.

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


def encode_origins(origins: Sequence[Origin | None]) -> str:
    """The origins of a commit's clips, as one text in the commit's line; empty where none is known.

    A reader of the ledger may hold millions of clips in memory, and most readers never ask for their origins.
    """
    known = [origin for origin in origins if origin is not None]
    if not known:
        return ""
    numbers = {file: number for number, file in enumerate(dict.fromkeys((o.file, o.size) for o in known))}
    clips = [None if o is None else (numbers[o.file, o.size], o.start_s, o.end_s) for o in origins]
    return json.dumps({"files": list(numbers), "clips": clips}, separators=(",", ":"))


def decode_origins(text: str, clips: int) -> list[Origin | None]:
    """The origins that `encode_origins` put into `text`; None for a clip that an earlier version stored without one.

    Raises:
        DamagedStore: `encode_origins` cannot have written the text for this number of clips.
    """
    if not text:
        return [None] * clips
    try:
        columns = json.loads(text)
        files = [(_typed(name, str), _typed(size, int)) for name, size in columns["files"]]
        origins: list[Origin | None] = []
        for clip in columns["clips"]:
            if clip is None:
                origins.append(None)
                continue
            file, start_s, end_s = clip
            if not (type(start_s) in _SECONDS and type(end_s) in _SECONDS):
                raise TypeError
            name, size = files[file]
            origins.append(Origin(name, size, start_s, end_s))
    except (ValueError, TypeError, LookupError):
        origins = []
    if len(origins) != clips:
        raise DamagedStore(
            f"'origins' of a commit is {text!r:.60}; expected file, start and end of {counted(clips, 'clip')}: "
            "another program wrote the ledger; encode again into another store"
        )
    return origins


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value
