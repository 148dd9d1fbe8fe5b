"""Advice that makes decoding faster, measured on a few clips: copies with short groups, or another decoder."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from egopatch.configs.schema import ConfigError, VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.measure import measure_decoding
from egopatch.extract.feed.pool import DecodePool, UndecodedClip
from egopatch.extract.transcoding.segment import KEY_FRAME_S, SHORT_SIDE
from egopatch.extract.video.container import open_video
from egopatch.extract.video.frames import read_frames, rows_within, sampled_rows
from egopatch.extract.video.indexing.cache import VideoCache
from egopatch.extract.video.nvdec import require_gpu_decoder
from egopatch.features.common.units import counted

DECODED = 0.6  # decoded share of a copy's frames before a wanted one; the others are B-frames that nothing refers to
WORTH = 2.0  # copies pay off from this many times fewer pixels to decode


@dataclass(frozen=True)
class Needed:
    """Numbers of frames that are decoded for one clip.

    Attributes:
        now: Of the video.
        copied: Of a copy with a key frame every `KEY_FRAME_S`.
        group_s: Mean time between key frames of the video.
        share: Pixels of a copy's frame, as a share of those of the video's.
    """

    now: int
    copied: int
    group_s: float
    share: float


def needed_frames(clip: Clip, video: VideoConfig, cache: VideoCache | None = None) -> Needed:
    """Count the frames that one clip needs, without decoding. Errors as in `extract.video.frames.read_frames`."""
    with open_video(clip.video, cache) as file:
        index, (width, height) = file.index, file.size
    rows = rows_within(clip, index)
    wanted = np.unique(sampled_rows(clip, index, rows, video))
    seconds = np.floor((index.starts_s - index.starts_s[rows[0]]) / KEY_FRAME_S)
    copied = 0
    for second in np.unique(seconds[wanted]):
        copied += int(wanted[seconds[wanted] == second].max()) + 1 - int(np.searchsorted(seconds, second))
    keys = index.keys_before(wanted)
    now = 0
    for key in np.unique(keys):
        group = np.arange(index.keys[key, 2] if key >= 0 else 0, wanted[keys == key].max() + 1)
        left_out = 0 if index.disposable is None else int(index.disposable[np.setdiff1d(group, wanted)].sum())
        now += len(group) - left_out
    group_s = (index.end_s - float(index.starts_s[0])) / max(len(index.keys), 1)
    return Needed(now, round(DECODED * copied), group_s, min(SHORT_SIDE / min(width, height), 1.0) ** 2)


def long_groups_hint(clips: Sequence[Clip], video: VideoConfig) -> str | None:
    """One line that advises transcoding, if copies of `clips` would need far fewer pixels decoded; else None."""
    with DecodePool(video, 1, needed_frames) as pool:
        needed = [found for found in pool.map(clips) if not isinstance(found, UndecodedClip)]
    if not needed:
        return None
    now, copied, group_s, share = (float(np.mean(values)) for values in zip(*map(astuple, needed), strict=True))
    if now < WORTH * copied * share:
        return None
    return (
        f"{now:.0f} frames of each clip are decoded to get {video.frames}, because key frames are {group_s:.1f} s "
        f"apart; copies made by `egopatch extract transcode --config CONFIG --out DIR` need about {copied:.0f}, with "
        f"{share:.0%} of the pixels"
    )


def gpu_decoder_hint(clips: Sequence[Clip], video: VideoConfig, decoders: int) -> str | None:
    """A line that says whether the CPU or the GPU decodes `clips` faster here; None where no GPU decodes."""
    try:
        require_gpu_decoder()
    except ConfigError:
        return None
    rates: dict[str, float] = {}
    for decoder in ("pyav", "nvdec"):
        with DecodePool(replace(video, decoder=decoder), decoders, _decode) as pool:
            measured = measure_decoding(pool, clips, decoders)
            rates[decoder] = measured.decoded / measured.seconds
    best = max(rates, key=rates.__getitem__)
    return (
        f"video.decoder {best} is faster: {decoders} decoders read {rates['pyav']:.1f} clips/s with pyav and "
        f"{rates['nvdec']:.1f} with nvdec, measured on {counted(len(clips), 'clip')}"
    )


def _decode(clip: Clip, video: VideoConfig, cache: VideoCache) -> bool:
    read_frames(clip, video, cache)
    return True
