"""What the index of shown frames costs on ordinary files: CPU time of a clip's frames, against the index of packets.

    python benchmarks/index_cost.py [--before b431f91] [--pairs 40] [--quick] [--out FILE]

`--before` is the last commit whose reader took every packet for a frame and every mark for a key frame; its source is
taken from git. Two processes read the same files in turns, the new one first in every second pair, each with nothing
known about the file. The figure is the median over the pairs of new CPU time over old CPU time: a pair is taken within
a fraction of a second, so that a busy machine slows both, and the median is deaf to the pairs that it slows unevenly; a
mean, or the quotient of sums, is not. Exit code 1 where it is above 1.03.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402

AT_MOST = 1.03
KINDS = {"short": (320, 240, 150), "long": (320, 240, 3000), "large": (1280, 720, 300)}  # width, height, frames
READER = """
import sys, time
from pathlib import Path
import torch
from egopatch.configs.schema import VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.video.frames import read_frames
torch.set_num_threads(1)
video = VideoConfig(frames=16)
for line in sys.stdin:
    started = time.process_time()
    frames = read_frames(Clip("clip", Path(line.rstrip())), video).frames
    took = time.process_time() - started
    print(took, sum(int(frame.sum()) for frame in frames), flush=True)
"""


def write(path: Path, width: int, height: int, frames: int) -> None:
    """Write a moving pattern with noise, as x264 encodes it by default."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (height, width, 3), np.uint8)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for n in range(frames):
            pixels = np.roll(noise, (n, 2 * n), (0, 1)) + np.uint8(2 * n % 200)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        out.mux(stream.encode())


class Reader:
    """A process that reads clips with the code in a folder."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, path: Path) -> tuple[float, int]:
        """CPU seconds for the clip, and the sum of its pixels."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(path, file=self._process.stdin, flush=True)
        seconds, pixels = self._process.stdout.readline().split()
        return float(seconds), int(pixels)

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", default="b431f91")
    parser.add_argument("--pairs", type=int, default=40)
    add_result_arguments(parser, "index_cost.json", "the shortest videos, two pairs")
    options = parser.parse_args()
    kinds = KINDS
    if options.quick:
        options.pairs, kinds = 2, {"short": KINDS["short"]}
    results: dict = {"machine": stamp("av"), "before": options.before, "pairs": options.pairs, "kinds": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(folder / "before")], check=True)
        subprocess.run(["git", "checkout", "--quiet", options.before], cwd=folder / "before", check=True)
        now, before = Reader(ROOT), Reader(folder / "before")
        for kind, shape in kinds.items():
            path = folder / f"{kind}.mp4"
            write(path, *shape)
            pixels = {reader.read(path)[1] for reader in (now, before)}  # also warms both
            assert len(pixels) == 1, "the two read other pixels"
            ratios, seconds = [], []
            for pair in range(options.pairs):
                times = {reader: reader.read(path)[0] for reader in ((now, before) if pair % 2 else (before, now))}
                ratios.append(times[now] / times[before])
                seconds.append(times[now])
            low, _, high = statistics.quantiles(ratios, n=4)
            results["kinds"][kind] = {
                "ratio": round(statistics.median(ratios), 4),
                "quartiles": [round(low, 4), round(high, 4)],
                "seconds_a_clip": round(statistics.median(seconds), 4),
            }
            print(kind, json.dumps(results["kinds"][kind]), flush=True)
        for reader in (now, before):
            reader.end()
    results["at_most"] = AT_MOST
    write_result(options, results)
    return 0 if options.quick or all(kind["ratio"] <= AT_MOST for kind in results["kinds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
