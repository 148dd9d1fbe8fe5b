"""`extract frames`: write the frames of a video, or of a stretch of it, that the encoder would receive."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from egopatch.configs.command_line import ConfigParser
from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.pool import DecodePool, UndecodedClip
from egopatch.extract.video.frames import DecodedClip, read_frames
from egopatch.extract.video.nvdec import require_gpu_decoder
from egopatch.features.common.command_line import local_path, print_result
from egopatch.features.common.units import counted
from egopatch.features.io.files import replacing

_FRAME = re.compile(r"\d{3,}_-?\d+\.\d{3}s\.png")  # the name of a PNG file that this command writes


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Decode and write; if the clip cannot be decoded, print the reason that quarantine would give and return 1."""
    parser.usage = "VIDEO --out FILE.npz|FOLDER [options]"
    parser.add_argument("file", metavar="VIDEO", type=Path, help="video file")
    for name in ("start", "end"):
        parser.add_argument(
            f"--{name}", type=float | None, default=None, metavar="SECONDS",
            help=f"{name} of the clip in seconds; default: {name} of the file",
        )  # fmt: skip
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="FILE.npz|FOLDER",
        help="NumPy file with frames [T, H, W, 3] uint8 and times_s [T] from the file's start; or folder for PNG files",
    )  # fmt: skip
    parser.add_class_arguments(VideoConfig, "video")
    options = parser.parse_args(list(args))
    try:
        video = parser.instantiate(options)["video"]
        clip = Clip(options.file.name, options.file, options.start, options.end)
    except ValueError as error:
        parser.error(str(error))
    if video.decoder == "nvdec":
        require_gpu_decoder()
    with DecodePool(video, 1, read_frames) as pool:
        (decoded,) = pool.map([clip])
    if isinstance(decoded, UndecodedClip):
        print(f"{parser.prog}: failed: {decoded.reason}", file=sys.stderr)
        return 1
    sizes = " and ".join(dict.fromkeys(f"{frame.shape[1]}x{frame.shape[0]}" for frame in decoded.frames))
    if " " in sizes and options.out.suffix == ".npz":
        print(
            f"{parser.prog}: failed: the frames of {options.file} have several sizes, {sizes}, which one array cannot "
            "hold; give --out a folder to get PNG files",
            file=sys.stderr,
        )
        return 1
    _write(decoded, options.out)
    times = ", ".join(f"{time:.3f}" for time in decoded.times_s)
    print_result(
        options.json,
        {"out": options.out, "shapes": [frame.shape for frame in decoded.frames], "times_s": [*decoded.times_s]},
        f"{options.out}: {counted(len(decoded.frames), 'frame')} of {sizes} pixels, at {times} s",
    )
    return 0


def _write(decoded: DecodedClip, out: Path) -> None:
    """Write the frames in place of those that an earlier call wrote to the same file or folder."""
    if out.suffix == ".npz":
        with replacing(out) as new, new.open("wb") as file:
            np.savez(file, frames=np.stack(decoded.frames), times_s=decoded.times_s)
        return
    frames = {f"{i:03d}_{time:.3f}s.png": decoded.frames[i] for i, time in enumerate(decoded.times_s)}
    for name, frame in frames.items():
        with replacing(out / name) as new:
            Image.fromarray(frame).save(new, "PNG")
    for path in out.iterdir():
        if _FRAME.fullmatch(path.name) and path.name not in frames:
            path.unlink()
