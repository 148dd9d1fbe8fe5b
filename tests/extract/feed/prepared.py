"""Clips that this process decodes and transforms for a CPU."""

from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import PreparedClip, read_clip
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.video.indexing.cache import VideoCache
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform


def prepare_clip(
    clip: Clip, video: VideoConfig, cache: VideoCache, transform: Transform = EGOVLP_TRANSFORM
) -> PreparedClip:
    return read_clip(clip, video, cache, [lambda decoded: to_input(decoded.frames, video.size, transform).numpy()])
