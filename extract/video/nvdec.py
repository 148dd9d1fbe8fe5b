"""Decoding on a GPU's video unit (NVDEC), through FFmpeg; it never falls back to the CPU.

Frames stay in the GPU's memory and only the wanted ones are copied. The unit returns the standard's values in another
order of bytes (NV12), which is put back before the colours are converted, so that 8-bit videos have PyAV's pixels.
"""

import functools

import av
from av.codec import Codec
from av.codec.hwaccel import HWAccel

from egopatch.configs.schema import ConfigError
from egopatch.extract.video.index import VideoError

# Formats in which the unit returns frames, and those in which the CPU decodes the same videos.
AS_ON_CPU = {"nv12": "yuv420p", "p010le": "yuv420p10le"}


def accelerator() -> HWAccel:
    """Settings with which `av.open` decodes on the first GPU that this process sees."""
    _context()
    return _settings()


def _settings() -> HWAccel:
    return HWAccel("cuda", allow_software_fallback=False, is_hw_owned=True)


@functools.cache
def _context() -> HWAccel:
    """Holds the GPU's context while this process lives; otherwise each video would start it anew."""
    return _settings().create(Codec("h264", "r"))


def require_gpu_decoder() -> None:
    """Check that there is a driver.

    Raises:
        ConfigError: There is none, or it does not start.
    """
    try:
        _settings().create(Codec("h264", "r"))
    except (av.FFmpegError, NotImplementedError) as error:
        raise ConfigError(
            f"video.decoder is nvdec, but FFmpeg cannot use an NVIDIA GPU here ({error}); check nvidia-smi, or take"
            " pyav, which decodes on the CPU"
        ) from error


def downloaded(frame: "av.VideoFrame") -> "av.VideoFrame":
    """A frame in the computer's memory, in the format that a decoder on the CPU returns."""
    if frame.format.name != "cuda" or frame.sw_format is None:
        return frame
    name = frame.sw_format.name
    if name not in AS_ON_CPU:
        raise VideoError(f"nvdec returns frames as {name}; expected {' or '.join(AS_ON_CPU)}; take video.decoder pyav")
    return frame.reformat(format=AS_ON_CPU[name], threads=1)
