"""The size that a Matroska or WebM file declares: FFmpeg takes one that ends with a cluster's header for complete."""

from pathlib import Path

_SEGMENT = bytes.fromhex("18538067")
_HEAD = 4096  # bytes; the segment begins after a header of some 40


def missing_bytes(path: Path) -> int:
    """Bytes by which a Matroska file is shorter than its segment; 0 if the segment declares no size, as in a stream.

    Source: RFC 8794 (EBML), sections 4 to 6: the leading zeros of a size give its length in bytes, and a size of ones
    is unknown.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    start = head.find(_SEGMENT) + len(_SEGMENT)
    if start < len(_SEGMENT) or start >= len(head) or head[start] == 0:
        return 0
    length = 9 - head[start].bit_length()
    most = (1 << 7 * length) - 1
    size = int.from_bytes(head[start : start + length], "big") & most
    return 0 if size == most else max(start + length + size - path.stat().st_size, 0)
