"""CPU time of decoding one clip's frames: only what they need, against everything before them, and against decord.

    python benchmarks/decode.py [--rounds 5] [--kinds short long large] [--quick] [--out FILE]

Three kinds of H.264 video, as x264 writes them by default. All contenders read the same 16 frames of the same files in
the same process, taking turns, with one thread and everything that a clip costs: opening, index, decoding, conversion
to RGB. The pixels must be equal. A figure is the median of all rounds, in CPU time.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402
from egopatch.configs.schema import VideoConfig  # noqa: E402
from egopatch.extract.datasets import Clip  # noqa: E402
from egopatch.extract.video import container, frames  # noqa: E402

Reader = Callable[[Path], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of video, at 30 frames a second."""

    width: int
    height: int
    seconds: float


KINDS = {
    "short": Kind(320, 240, 2),
    "long": Kind(456, 256, 30),
    "large": Kind(1280, 720, 10),
}


def write_video(path: Path, kind: Kind, seed: int = 0) -> Path:
    """Write patches of colour that drift over a noisy ground: motion to predict, and a residue to code."""
    rng = np.random.default_rng(seed)
    shape = -(-kind.height // 8), -(-kind.width // 8), 3
    ground = rng.integers(0, 255, shape, np.uint8).repeat(8, 0).repeat(8, 1)[: kind.height, : kind.width]
    noise = rng.integers(0, 24, (4, kind.height, kind.width, 3), np.uint8)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = kind.width, kind.height, "yuv420p"
        for index in range(round(kind.seconds * 30)):
            pixels = np.roll(ground, (index, 2 * index), (0, 1)) // 2 + noise[index % 4]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def everything(path: Path) -> list[np.ndarray]:
    """Decode every packet from the key frame to the last wanted frame, read from the file again after the index."""
    kept, container.KEPT_BYTES = container.KEPT_BYTES, 0
    try:
        with container.open_video(path) as file:
            file.index = dataclasses.replace(file.index, disposable=None)
            return list(frames._read(Clip("clip", path), VideoConfig(), file, as_planes=False).frames)
    finally:
        container.KEPT_BYTES = kept


def needed(path: Path) -> list[np.ndarray]:
    """Decode as the pipeline does."""
    return list(frames.read_frames(Clip("clip", path), VideoConfig()).frames)


def decord_alone(path: Path) -> list[np.ndarray]:
    """Decode with decord as others use it: without an index, trusting all of its frames."""
    import decord

    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    return list(reader.get_batch(frames.uniform_indices(len(reader), VideoConfig().frames)).asnumpy())


def decord_checked(path: Path) -> list[np.ndarray]:
    """Decode as the pipeline does with `video.decoder: decord`."""
    return list(frames.read_frames(Clip("clip", path), VideoConfig(decoder="decord")).frames)


CONTENDERS: dict[str, Reader] = {
    "everything": everything,
    "needed": needed,
    "decord alone": decord_alone,
    "decord checked": decord_checked,
}


def measure(path: Path, rounds: int) -> dict[str, float]:
    """CPU milliseconds a clip of each contender."""
    expected = everything(path)
    for name, read in CONTENDERS.items():
        if not all(np.array_equal(one, other) for one, other in zip(read(path), expected, strict=True)):
            raise SystemExit(f"{name} reads other pixels of {path.name}")
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name, read in CONTENDERS.items():
            started = time.process_time()
            read(path)
            times[name].append(1000 * (time.process_time() - started))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    add_result_arguments(parser, None, "the shortest videos, one round")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.kinds = 1, options.kinds[:1]
    kinds: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.kinds:
            taken = measure(write_video(Path(folder) / f"{name}.mp4", KINDS[name]), options.rounds)
            kinds[name] = dataclasses.asdict(KINDS[name]) | {
                "cpu_ms_per_clip": taken,
                "clips_per_cpu_s": {one: 1000 / value for one, value in taken.items()},
                "share_of_everything": {one: value / taken["everything"] for one, value in taken.items()},
            }
            print(name, ", ".join(f"{one} {value:.1f} ms" for one, value in taken.items()), flush=True)
    result = {
        "kinds": kinds,
        "rounds": options.rounds,
        "machine": stamp("av", "decord2"),
    }
    write_result(options, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
