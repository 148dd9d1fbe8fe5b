"""Decoding on a GPU's video unit (NVDEC), through FFmpeg; it never falls back to the CPU.

Frames stay in the GPU's memory and only the wanted ones are copied. The unit returns the standard's values in another
order (NV12), which is undone before the colours are converted, so that the pixels of H.264, HEVC and VP9 equal PyAV's.
MPEG-1, MPEG-2, MPEG-4 part 2 and JPEG leave the rounding open, so theirs may differ a little.
"""

import functools
from pathlib import Path

import av
import av.logging
from av.codec import Codec
from av.codec.hwaccel import HWAccel

from egopatch.configs.schema import ConfigError
from egopatch.extract.video.indexing.index import VideoError

# Format in which the unit returns frames -> format in which the CPU decodes the same videos.
AS_ON_CPU = {"nv12": "yuv420p", "p010le": "yuv420p10le"}


def accelerator() -> HWAccel:
    """Settings with which `av.open` decodes on the first GPU that this process sees."""
    return _settings(primary=_held_context() is not None)


def uses_gpu(stream: "av.VideoStream") -> bool:
    """Whether FFmpeg has a decoder for the codec that runs on the GPU."""
    return stream.codec_context.is_hwaccel


def require_gpu_decoder() -> None:
    """Check that FFmpeg can use a GPU.

    Raises:
        ConfigError: FFmpeg cannot, for instance because there is no driver.
    """
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)  # otherwise nothing is logged
    try:
        with av.logging.Capture() as logged:
            # Not the primary context, which torch may have started in this process with flags that FFmpeg refuses.
            _settings(primary=False).create(Codec("h264", "r"))
    except (av.FFmpegError, NotImplementedError) as error:  # the second if FFmpeg was built without GPU support
        cause = "; ".join(message.strip() for _, _, message in logged) or str(error)
        raise ConfigError(
            f"video.decoder is nvdec, but FFmpeg cannot use an NVIDIA GPU here ({cause}); check nvidia-smi, or use"
            " pyav, which decodes on the CPU"
        ) from error
    finally:
        av.logging.set_level(level)


def refusal(path: Path, cause: str) -> VideoError:
    """The error for a video that the GPU does not decode but that PyAV may."""
    return VideoError(f"video {path} cannot be decoded by nvdec: {cause}; use video.decoder pyav for it")


def downloaded(path: Path, frame: "av.VideoFrame") -> "av.VideoFrame":
    """A frame of `path` in the computer's memory, in the format that a decoder on the CPU returns.

    Raises:
        VideoError: The GPU returns frames in a format whose equivalent on the CPU is not known.
    """
    if frame.format.name != "cuda":
        return frame
    name = frame.sw_format.name if frame.sw_format is not None else "an unknown format"
    if name not in AS_ON_CPU:
        raise refusal(path, f"the GPU returns its frames as {name}; expected {' or '.join(AS_ON_CPU)}")
    return frame.reformat(format=AS_ON_CPU[name], threads=1)


def _settings(primary: bool) -> HWAccel:
    options: dict[str, object] = {"primary_ctx": str(int(primary))}
    return HWAccel("cuda", allow_software_fallback=False, is_hw_owned=True, options=options)


@functools.cache
def _held_context() -> HWAccel | None:
    """The GPU's primary context, held while this process lives; otherwise each video would start it anew.

    None if another library has started it with other flags: then each video has a context of its own. None also if
    there is no GPU, which opening the video reports.
    """
    try:
        return _settings(primary=True).create(Codec("h264", "r"))
    except (av.FFmpegError, NotImplementedError):  # the second if FFmpeg was built without GPU support
        return None
