"""Frames decoded by decord, each checked against the index and the pixels that PyAV decodes.

decord 3.4 silently returns wrong frames if groups are open, key frames are marked wrongly, the size changes, or data is
damaged, and it counts frames that an edit list removes. Nothing that it reports reveals all of these cases, so both
decode each clip, and a file on which they differ is refused. PyAV can then decode it into the same store.
"""

import numpy as np
from numpy.typing import NDArray

from egopatch.extract.video.container import VideoFile
from egopatch.extract.video.indexing.index import VideoError
from egopatch.features.common.units import counted

SAME_TIME_S = 2e-3  # decord counts in float32, some containers in milliseconds


def decord_pixels(file: VideoFile, rows: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """As `VideoFile.pixels`.

    Raises:
        VideoError: decord's frames differ from the index in number or times, or from PyAV's in their pixels.
    """
    import decord  # imported only if it is chosen: its libraries take 70 MB

    expected = file.pixels(rows)
    try:
        reader = decord.VideoReader(str(file.path), ctx=decord.cpu(0), num_threads=1)
        times_s = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0]
        if len(times_s) != len(file.index.pts):
            raise _refused(
                file, f"it counts {counted(len(times_s), 'frame')}, but the file shows {len(file.index.pts)}"
            )
        if np.abs(times_s - file.index.starts_s).max() > SAME_TIME_S:
            raise _refused(file, "its frame times differ from PyAV's")
        decoded = list(reader.get_batch(rows).asnumpy())
    except decord.DECORDError as error:
        raise _refused(file, str(error).strip().splitlines()[-1]) from error
    for row, frame, same in zip(rows.tolist(), decoded, expected, strict=True):
        if not np.array_equal(frame, same):
            raise _refused(file, f"its pixels differ from PyAV's at {file.index.starts_s[row]:.3f} s")
    return decoded


def _refused(file: VideoFile, what: str) -> VideoError:
    return VideoError(f"video {file.path} cannot be decoded by decord: {what}; use video.decoder pyav for it")
