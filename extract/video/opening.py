"""Opening a video file with FFmpeg: the file itself, its picture track, and the errors that say why it cannot be."""

import functools
import re
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import av.logging
from av.stream import Disposition

from egopatch.extract.datasets.folder import ARCHIVES, missing_hint, names_in
from egopatch.extract.video.indexing.index import LogLine, VideoError
from egopatch.extract.video.nvdec import accelerator, refusal
from egopatch.features.io.lfs import pointer_fault

# FFmpeg's formats whose file only names others. Its hash would not change with theirs, and some of them crash PyAV.
LISTS = ("concat", "dash", "hls", "imf", "rtsp", "sdp")
# Titles and the like, which may be in any encoding and are not used; PyAV 19 always accepts them.
_ANY_TITLES: dict[str, Any] = {} if av.__version__ >= "19" else {"metadata_errors": "replace"}
NOT_THE_FILM = Disposition.attached_pic | Disposition.timed_thumbnails


def require_content(path: Path) -> None:
    """Check that the file exists and has bytes of its own.

    Raises:
        VideoError: It does not, or is no regular file, an archive or a pointer of Git LFS.
    """
    try:
        # Asked first: to open a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise VideoError(f"video {path} is a {_kind(path.stat().st_mode)}; expected a regular file")
        with path.open("rb") as file:
            empty = not file.read(1)
        pointer = pointer_fault(path)
    except FileNotFoundError:
        hint = missing_hint(path, names_in(path.parent))
        raise VideoError(f"video {path} {hint or 'does not exist; put the file there or correct its path'}") from None
    except OSError as error:
        raise VideoError(f"video {path} cannot be read: {error.strerror}; expected a readable file") from error
    if empty:
        raise VideoError(f"video {path} is empty (0 bytes); download it again")
    if pointer:
        raise VideoError(f"video {path} {pointer}")
    if path.suffix.lower() in ARCHIVES:
        raise VideoError(f"video {path} is an archive; unpack it and name a video in it")


def opened(path: Path, on_gpu: bool = False, logged: Sequence[LogLine] = ()) -> "av.container.InputContainer":
    """The open file; the caller closes it.

    Args:
        path: The file.
        on_gpu: Whether a GPU decodes, as far as it supports the codec.
        logged: What FFmpeg logs meanwhile.

    Raises:
        VideoError: The GPU cannot be used, although the file can be opened.
        av.FFmpegError: The file cannot be opened.
    """
    # `file:`, because FFmpeg takes what precedes a colon for a protocol.
    open_file = functools.partial(av.open, f"file:{path.absolute()}", **_ANY_TITLES)
    if not on_gpu:
        return open_file()
    try:
        return open_file(hwaccel=accelerator())
    except av.FFmpegError as error:
        cause = cause_of(error, logged)
        with open_file():  # raises the error of a file that cannot be opened at all
            raise refusal(path, f"the GPU cannot be used ({cause})") from error
    except RuntimeError:  # no track has a decoder that uses the GPU; `VideoFile.pixels` reports it and names the codec
        return open_file()


def video_stream(path: Path, container: "av.container.InputContainer") -> "av.VideoStream":
    """The picture track that players show: never a cover or a preview where there is another.

    Raises:
        VideoError: There is none, or FFmpeg has no decoder for it; or the file only names other files.
    """
    if container.format.name in LISTS:
        raise VideoError(
            f"video {path} is a list of other files ({container.format.long_name}), not a video; join them into one"
            f" file, for instance with `ffmpeg -i {shlex.quote(str(path))} -c copy joined.mp4`, and name that"
        )
    films = [stream for stream in container.streams.video if not stream.disposition & NOT_THE_FILM]
    if not films:
        kinds = [stream.type if stream not in container.streams.video else "cover" for stream in container.streams]
        raise VideoError(
            f"video {path} cannot be decoded: it has no picture track (tracks: {', '.join(kinds) or 'none'});"
            " expected a complete video"
        )
    best = container.streams.best("video")
    film = next((stream for stream in films if best is not None and stream.index == best.index), films[0])
    if film.codec_context is None:
        raise VideoError(
            f"video {path} cannot be decoded: FFmpeg has no decoder for its codec, {_codec(path)}; convert it to H.264"
        )
    film.codec_context.thread_count = 1  # every core runs its own decoder
    return film


def cause_of(error: "av.FFmpegError", logged: Sequence[LogLine]) -> str:
    """The error, and the last line that FFmpeg logged, which often says more."""
    return f"{error.strerror}: {logged[-1][2].strip()}" if logged else str(error.strerror)


def _kind(mode: int) -> str:
    """What is there in place of a regular file."""
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def _codec(path: Path) -> str:
    """What FFmpeg says about the codec of a track that it cannot decode."""
    av.logging.set_level(av.logging.WARNING)
    with av.logging.Capture() as logged, opened(path):
        pass
    av.logging.set_level(av.logging.ERROR)
    found = (re.search(r"Video: ([^,]*)", message) for _, _, message in logged)
    return next((match[1] for match in found if match), "an unknown one")
