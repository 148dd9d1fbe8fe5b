"""What would make decoding faster, measured on a few clips: copies with short groups, or another decoder."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from egopatch.configs.schema import ConfigError, VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.pool import DecodePool, UndecodedClip
from egopatch.extract.transcoding.segment import KEY_FRAME_S
from egopatch.extract.video.container import open_video
from egopatch.extract.video.frames import positions, read_frames, rows_within
from egopatch.extract.video.nvdec import require_gpu_decoder
from egopatch.extract.video.once import OncePerVideo

WORTH = 2.0  # times fewer frames to decode


@dataclass(frozen=True)
class Needed:
    """Numbers of frames that are decoded for one clip.

    Attributes:
        now: Of the video.
        copied: Of a copy with a key frame every `KEY_FRAME_S`.
        group_s: Mean time between key frames of the video.
    """

    now: int
    copied: int
    group_s: float


def needed_frames(clip: Clip, video: VideoConfig, once: OncePerVideo | None = None) -> Needed:
    """Count what one clip needs, without decoding it. Errors as in `extract.video.frames.read_frames`."""
    with open_video(clip.video, once) as file:
        index = file.index
    rows = rows_within(clip, index)
    wanted = np.unique(rows[positions(clip, index, rows, video)])
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
    return Needed(now, copied, (index.end_s - float(index.starts_s[0])) / max(len(index.keys), 1))


def long_groups_hint(clips: Sequence[Clip], video: VideoConfig) -> str | None:
    """A line that advises to transcode, if copies of `clips` would need far fewer frames."""
    with DecodePool(video, 1, needed_frames) as pool:
        needed = [one for one in pool.map(clips) if not isinstance(one, UndecodedClip)]
    now, copied = (sum(getattr(one, name) for one in needed) for name in ("now", "copied"))
    if not needed or now < WORTH * copied:
        return None
    group_s = sum(one.group_s for one in needed) / len(needed)
    return (
        f"key frames are {group_s:.1f} s apart, so a clip of {video.frames} frames costs {now / len(needed):.0f}; it would"
        f" cost {copied / len(needed):.0f} of the small copies that `python -m extract transcode --config CONFIG --out DIR`"
        " writes"
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
            for _ in pool.map(clips[:decoders]):  # the time to start does not count
                pass
            started = time.perf_counter()
            done = [one for one in pool.map(clips) if not isinstance(one, UndecodedClip)]
            rates[decoder] = len(done) / (time.perf_counter() - started)
    best = max(rates, key=rates.__getitem__)
    return (
        f"video.decoder {best}: {decoders} decoders read {rates['pyav']:.1f} clips/s with pyav and"
        f" {rates['nvdec']:.1f} with nvdec, measured on {len(clips)}"
    )


def _decode(clip: Clip, video: VideoConfig, once: OncePerVideo) -> bool:
    read_frames(clip, video, once)
    return True
