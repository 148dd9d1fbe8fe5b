"""The size that a file declares: FFmpeg takes some that end between two frames for complete."""

from pathlib import Path
from typing import BinaryIO

_HEAD = 4096  # bytes in which the declaration begins
_SEGMENT = bytes.fromhex("18538067")
_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_BROADCAST = 1
_UNKNOWN = (1 << 32) - 1


def missing_bytes(path: Path, container: str) -> int:
    """Bytes by which a file is shorter than it declares; 0 if it declares no size, as a stream does not.

    Args:
        path: The video.
        container: FFmpeg's name of its format. Matroska and WebM, AVI, and ASF (WMV) declare their size.
    """
    declared = next((read for name, read in _DECLARED.items() if name in container), None)
    if declared is None:
        return 0
    with path.open("rb") as file:
        return max(declared(file) - path.stat().st_size, 0)


def _matroska(file: BinaryIO) -> int:
    """Source: RFC 8794 (EBML), sections 4 to 6: the leading zeros of a size give its length in bytes, and a size of
    ones is unknown.
    """
    head = file.read(_HEAD)
    start = head.find(_SEGMENT) + len(_SEGMENT)
    if start < len(_SEGMENT) or start >= len(head) or head[start] == 0:
        return 0
    length = 9 - head[start].bit_length()
    most = (1 << 7 * length) - 1
    size = int.from_bytes(head[start : start + length], "big") & most
    return 0 if size == most else start + length + size


def _avi(file: BinaryIO) -> int:
    """Source: OpenDML AVI file format extensions 1.02: a file is a sequence of RIFF chunks, at even places."""
    end = 0
    while (head := file.read(8))[:4] == b"RIFF" and 0 < (size := int.from_bytes(head[4:], "little")) < _UNKNOWN:
        end = file.tell() + size
        file.seek(end + size % 2)
    return end


def _asf(file: BinaryIO) -> int:
    """Source: Advanced Systems Format specification, section 3.2: the size in the file properties object, which is not
    valid in a broadcast.
    """
    head = file.read(_HEAD)
    start = head.find(_FILE_PROPERTIES)
    if start < 0 or int.from_bytes(head[start + 88 : start + 92], "little") & _BROADCAST:
        return 0
    return int.from_bytes(head[start + 40 : start + 48], "little")


_DECLARED = {"matroska": _matroska, "avi": _avi, "asf": _asf}
