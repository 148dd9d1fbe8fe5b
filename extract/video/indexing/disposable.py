"""Recognises frames that no other frame refers to, from their packets and without decoding.

Decoding may leave them out unless a clip needs them: in H.264 pictures with `nal_ref_idc` 0 (ITU-T H.264, 7.4.1), in
HEVC sub-layer non-reference pictures of the highest sub-layer (ITU-T H.265, 3.142; those of a lower one may be referred
to from above), in MPEG-4 B-VOPs (ISO/IEC 14496-2). In VP9 and AV1 every frame may change the probabilities of the next
one, so that none is left out. A packet with anything else in it, such as parameter sets, is always decoded.
"""

from collections.abc import Callable
from typing import TypeAlias

import av

# Layer of a packet's frame, and whether no frame of the same layer or of a lower one refers to it.
Layered: TypeAlias = tuple[int, bool]
LayerReader: TypeAlias = Callable[["av.Packet[av.VideoStream]"], Layered | None]

H264_SLICE = 1
H264_BESIDE = (6, 9, 12)  # supplemental information, delimiter, filler
HEVC_LOWEST_RESERVED = 16  # below it are the slices, of which those with an even number are non-reference pictures
HEVC_NON_REFERENCE = (0, 2, 4, 6, 8)
HEVC_BESIDE = (35, 38, 39, 40)  # delimiter, filler, supplemental information before and after
VOP, B_VOP = b"\x00\x00\x01\xb6", 2
ALWAYS_DECODED: Layered = (0, False)


def layer_reader(stream: "av.VideoStream") -> LayerReader | None:
    """A function that returns the layer of each packet of `stream`; None if all packets must be decoded.

    The function itself returns None once packets turn out not to hold one frame each: then all must be decoded, too.
    """
    extradata = stream.codec_context.extradata or b""
    name = stream.codec_context.name
    # Version 1 of avcC and hvcC: units with their lengths before them, as in mp4 and mkv. Start codes are not searched.
    if name == "h264" and len(extradata) > 4 and extradata[0] == 1:
        return lambda packet: _h264_layer(packet, extradata[4] % 4 + 1)
    if name == "hevc" and len(extradata) > 21 and extradata[0] == 1:
        return lambda packet: _hevc_layer(packet, extradata[21] % 4 + 1)
    return _mpeg4_layer if name == "mpeg4" else None


def _h264_layer(packet: "av.Packet[av.VideoStream]", length_bytes: int) -> Layered:
    is_disposable = False
    for unit in _units(packet, length_bytes):
        kind, references = unit[0] & 31, unit[0] >> 5 & 3
        if kind == H264_SLICE and references == 0:
            is_disposable = True
        elif kind not in H264_BESIDE:
            return ALWAYS_DECODED
    return 0, is_disposable


def _hevc_layer(packet: "av.Packet[av.VideoStream]", length_bytes: int) -> Layered:
    layer, is_disposable, is_plain = 0, False, True
    for unit in _units(packet, length_bytes):
        kind, temporal_id = unit[0] >> 1 & 63, unit[1] % 8 - 1
        if kind < HEVC_LOWEST_RESERVED:
            layer = max(layer, temporal_id)
            is_disposable = kind in HEVC_NON_REFERENCE
            is_plain &= is_disposable
        elif kind not in HEVC_BESIDE:
            is_plain = False
    return layer, is_disposable and is_plain


def _mpeg4_layer(packet: "av.Packet[av.VideoStream]") -> Layered | None:
    content = bytes(packet)
    if content.count(VOP) > 1:
        return None  # packed B-frames
    is_plain = content.startswith(VOP) and len(content) > len(VOP)
    return 0, is_plain and content[len(VOP)] >> 6 == B_VOP


def _units(packet: "av.Packet[av.VideoStream]", length_bytes: int) -> list[memoryview]:
    """The units of a packet; none where their lengths do not add up, so that a damaged packet is decoded."""
    content, units, place = memoryview(packet), [], 0
    while place < len(content):
        start = place + length_bytes
        place = start + int.from_bytes(content[place:start], "big")
        units.append(content[start:place])
    return units if place == len(content) and all(len(unit) > 1 for unit in units) else []
