"""Whether a GPU's video unit decodes as the CPU does, and for which videos it pays.

    python benchmarks/nvdec.py [--seconds 2] [--processes 4 16] [--out benchmarks/results/nvdec_h100.json]

The three kinds of `benchmarks/decode.py`, and 1920x1080; 16 frames a clip. First the pixels of both decoders are
compared, and what the unit refuses is listed. Then processes read clips for some seconds, as the children of a job do:
one a core with PyAV, and several numbers of them with nvdec. Exit code 1 where pixels differ, but for MPEG-4, whose
standard leaves the rounding open. Under 90 seconds; without a GPU it says so and ends with exit code 2.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402
from benchmarks.decode import KINDS, Kind, write_video  # noqa: E402
from egopatch.configs.schema import ConfigError, VideoConfig  # noqa: E402
from egopatch.extract.datasets import Clip  # noqa: E402
from egopatch.extract.video.frames import VideoError, read_frames  # noqa: E402
from egopatch.extract.video.indexing.cache import VideoCache  # noqa: E402
from egopatch.extract.video.nvdec import require_gpu_decoder  # noqa: E402

ALL_KINDS = {**KINDS, "full hd": Kind(1920, 1080, 10)}
CODECS = {
    "h264 high": ("a.mp4", "libx264", "yuv420p"),
    "h264 4:2:2, 10 bit": ("b.mp4", "libx264", "yuv422p10le"),
    "hevc": ("c.mp4", "libx265", "yuv420p"),
    "hevc, 10 bit": ("d.mp4", "libx265", "yuv420p10le"),
    "vp9": ("e.webm", "libvpx-vp9", "yuv420p"),
    "av1": ("f.mp4", "libsvtav1", "yuv420p"),
    "mpeg4": ("g.mp4", "mpeg4", "yuv420p"),
}


def write_coded(path: Path, codec: str, pix_fmt: str) -> Path:
    """Write thirty frames of moving patches."""
    ground = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as file:
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = file.add_stream(codec, rate=25, options=quiet)
        stream.width, stream.height, stream.pix_fmt = 256, 192, pix_fmt
        for index in range(30):
            pixels = np.roll(ground, (index, 2 * index), (0, 1))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def compared(path: Path, decoder: str = "nvdec") -> str:
    """`equal`, the largest difference to PyAV's frames, or the error if either decoder cannot decode the file."""
    clip = Clip("clip", path)
    try:
        one, other = (read_frames(clip, VideoConfig(decoder=name)).frames for name in ("pyav", decoder))  # type: ignore[arg-type]
    except VideoError as error:
        return str(error)
    largest = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(one, other, strict=True))
    return "equal" if largest == 0 else f"differ by up to {largest}"


def read_for(path: Path, decoder: str, seconds: float, started: Barrier) -> tuple[int, float, float]:
    """Clips read, seconds and CPU seconds, counted once every process has read its first clip."""
    video, cache = VideoConfig(decoder=decoder), VideoCache()  # type: ignore[arg-type]
    clips = [Clip("clip", path)]
    read_frames(clips[0], video, cache)
    started.wait()
    clock, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - clock < seconds:
        read_frames(clips[0], video, cache)
        count += 1
    return count, time.perf_counter() - clock, time.process_time() - cpu


def rate(path: Path, decoder: str, processes: int, seconds: float) -> dict[str, float]:
    """Clips a second of all processes together, and CPU milliseconds a clip."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        started = manager.Barrier(processes)
        jobs = [pool.submit(read_for, path, decoder, seconds, started) for _ in range(processes)]
        done = [job.result() for job in jobs]
    clips = sum(count for count, _, _ in done)
    return {
        "clips_per_s": sum(count / taken for count, taken, _ in done),
        "cpu_ms_per_clip": 1000 * sum(cpu for _, _, cpu in done) / clips,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--processes", type=int, nargs="+", default=[4, 16], help="of nvdec")
    add_result_arguments(parser, None, "PyAV in place of NVDEC, two files, two processes")
    options = parser.parse_args()
    cores, decoder, codecs, kinds = len(os.sched_getaffinity(0)), "nvdec", CODECS, ALL_KINDS
    if options.quick:
        cores, decoder, options.processes, options.seconds = 2, "pyav", [2], 0.1
        codecs, kinds = {"hevc": CODECS["hevc"]}, {"short": KINDS["short"]}
    else:
        try:
            require_gpu_decoder()
        except ConfigError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 2
    pixels: dict[str, str] = {}
    rates: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, codec, pix_fmt) in codecs.items():
            pixels[name] = compared(write_coded(Path(folder) / file, codec, pix_fmt), decoder)
            print(f"{name}: {pixels[name]}", flush=True)
        for name, kind in kinds.items():
            path = write_video(Path(folder) / f"{name}.mp4", kind)
            pixels[name] = compared(path, decoder)
            ways = [("pyav", cores), *((decoder, count) for count in options.processes)]
            rates[name] = {f"{way} x {count}": rate(path, way, count, options.seconds) for way, count in ways}
            speeds = "; ".join(
                f"{way}: {speed['clips_per_s']:.1f} clips/s, {speed['cpu_ms_per_clip']:.1f} CPU ms"
                for way, speed in rates[name].items()
            )
            print(f"{name}: {pixels[name]}; {speeds}", flush=True)
    result = {"pixels": pixels, "rates": rates, "machine": stamp("av", "PyNvVideoCodec")}
    write_result(options, result)
    return int(any(value.startswith("differ") for name, value in pixels.items() if name != "mpeg4"))


if __name__ == "__main__":
    raise SystemExit(main())
