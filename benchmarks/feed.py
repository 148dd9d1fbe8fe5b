"""What stage one costs around its encoder: decoding, hand-over and writing, each against the least that it could cost.

    python benchmarks/feed.py [--rounds 10] [--encoder-rate CLIPS_PER_S] [--folder FOLDER] [--json] [--quick]

For three kinds of H.264 video, each clip a file of its own:
cpu_ratio: CPU time a clip of all processes (decoding, index, hash, hand-over to an encoder that only takes the bytes,
    as a GPU's does) over that of FFmpeg decoding the same frames in a loop; cpu_ratio_host with the CPU's transform.
serial_ms: CPU time a clip of the parent's main thread, without the copy to the device, which a GPU does by itself;
    copy_ms is that of the copy.
handover_clips_per_s: rate at which two children that decode nothing bring frames into the memory from which a GPU
    copies them by itself; handover_and_copy_clips_per_s also has a core of this machine make that copy.
write_share: time of bare write and fsync of some shards, one after another, over that of a worker's writing them with
    its checks, reading back included.
CPU time and ratios within a run, because the machine may be busy. `forecast` is what these figures mean for 16 cores
and an H100, with its assumptions.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._feed_videos import KINDS, Kind, decode_bare, wanted, write_video  # noqa: E402
from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402
from egopatch.configs.schema import VideoConfig  # noqa: E402
from egopatch.extract.children.slots import SharedSlots  # noqa: E402
from egopatch.extract.datasets import Clip  # noqa: E402
from egopatch.extract.feed.clips import PreparedClip, frames_and_cuts, read_clip  # noqa: E402
from egopatch.extract.feed.pixels import FrameKind, finish_pixels  # noqa: E402
from egopatch.extract.feed.pool import TOGETHER, DecodePool, slots_for  # noqa: E402
from egopatch.extract.video.indexing.cache import VideoCache  # noqa: E402
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform  # noqa: E402
from egopatch.features.common.machine import request_huge_pages  # noqa: E402

# Decoder children import this file too, so whatever needs torch is imported where it is used.

VIDEO = VideoConfig()
CLIPS = {"320x240, 2 s": 32, "456x256, 30 s": 4, "1280x720, 10 s": 2}  # about a second of decoding each
BATCH = 2
SHARD, SHARDS, WRITTEN = 64, 6, 6
HANDED = 400
HANDOVER = ("handover_clips_per_s", "handover_and_copy_clips_per_s")
NODE_CORES, H100_CLIPS_PER_S, NODE_DISK_GB_PER_S = 16, 1000.0, 2.0


@cache
def _kept(clip: Clip, transform: Transform) -> PreparedClip:
    finish = partial(finish_pixels, kind=FrameKind(VIDEO.size, transform, planes=True), most=1 << 30)
    return read_clip(clip, VIDEO, VideoCache(), [finish], as_planes=True)


def decode_nothing(clip: Clip, video: VideoConfig, cache: VideoCache, transform: Transform) -> PreparedClip:
    """Frames that this child has decoded before, from the one file that all clips name."""
    return replace(_kept(replace(clip, clip_id="any"), transform), clip=clip)


def taker(rate: float | None, copies: bool, transforms: bool) -> Any:
    """Encoder that takes frames as a device does, with a copy of their bytes unless `copies` is off, or as a CPU does,
    which `transforms` them instead. It returns no rows; its results are ready at once, or at `rate` clips a second.
    """
    import torch

    from egopatch.extract.feed.on_host import to_input
    from egopatch.extract.worker.batch_encoder import BatchEncoder, Row

    class Taker(BatchEncoder):
        held = 1

        def __init__(self) -> None:
            self.size, self.seconds, self.handover_s, self.busy_s, self._taken = BATCH, 0.0, 0.0, 0.0, []
            self._device = np.empty(1 << 26, np.uint8)
            self._busy_until = self.copy_s = 0.0

        def __exit__(self, *_: object) -> None:
            pass

        def _receive(self, clip: PreparedClip) -> None:
            assert isinstance(clip.frames, tuple)
            if transforms:
                torch.set_num_threads(1)  # one core transforms a clip, as it encodes it
                frames, cuts = frames_and_cuts(clip.frames)
                to_input(frames, VIDEO.size, EGOVLP_TRANSFORM, cuts)
            started = time.thread_time()
            for run in clip.frames if copies and not transforms else ():
                pixels = np.asarray(run.frames)
                np.copyto(self._device[: pixels.nbytes], pixels.reshape(-1))
            self.copy_s += time.thread_time() - started
            clip.release()

        def _launch(self, clips: Sequence[PreparedClip]) -> Callable[[], tuple[list[Row], list[bool]]]:
            now = time.perf_counter()
            self._busy_until = max(self._busy_until, now) + (len(clips) / rate if rate else 0.0)
            end = self._busy_until

            def wait() -> tuple[list[Row], list[bool]]:
                time.sleep(max(end - time.perf_counter(), 0.0))
                return [{} for _ in clips], [False for _ in clips]

            return wait

        def _times(self, clip: PreparedClip) -> Any:
            return None

    return Taker()


def feed(
    pool: DecodePool[PreparedClip],
    clips: Iterable[Clip],
    rate: float | None,
    copies: bool = True,
    transforms: bool = False,
) -> tuple[int, int, float, float]:
    """Bring all clips to the encoder as the pipeline does.

    Returns:
        Clips, bytes of frames, and this thread's CPU seconds: without the copies to the device, and for these alone.
    """
    started = time.thread_time()
    done = nbytes = 0
    finish: Callable[[], object] = dict
    with taker(rate, copies, transforms) as batches:
        for result in pool.map(clips, together=TOGETHER):
            assert isinstance(result, PreparedClip), result
            nbytes += result.memory_used
            done += 1
            batches.add(result)
            if done % BATCH == 0:
                following = batches.start()
                finish()
                finish = following
        batches.start()()
        finish()
    return done, nbytes, time.thread_time() - started - batches.copy_s, batches.copy_s


def children_cpu() -> float:
    """CPU seconds of all living children."""
    used = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in used)


def measure_feed(clips: list[Clip], rounds: int, planes: bool, rate: float | None) -> dict[str, float]:
    """CPU milliseconds a clip of children and parent in the best round, and the pipeline's rate in that round."""
    from egopatch.extract.feed.decoders import open_decoders

    best: dict[str, float] = {}
    with open_decoders(VIDEO, [FrameKind(VIDEO.size, EGOVLP_TRANSFORM, planes)], 1, BATCH + 4) as pool:
        feed(pool, clips[:2], None)  # the child has started
        for number in range(rounds):
            # New names, so that nothing is cached about these files.
            fresh = [Clip(f"{number}-{i}", _link(clip.video, number)) for i, clip in enumerate(clips)]
            child, parent, started = children_cpu(), time.process_time(), time.perf_counter()
            done, nbytes, serial, copy = feed(pool, fresh, rate, transforms=not planes)
            found = {
                "children_ms": 1e3 * (children_cpu() - child) / done,
                "parent_ms": 1e3 * (time.process_time() - parent) / done,
                "serial_ms": 1e3 * serial / done,
                "copy_ms": 1e3 * copy / done,
                "clips_per_s": done / (time.perf_counter() - started),
                "frame_mb": nbytes / done / 1e6,
            }
            if not best or found["children_ms"] + found["parent_ms"] < best["children_ms"] + best["parent_ms"]:
                best = found
    return best


def _link(path: Path, number: int) -> Path:
    linked = path.with_name(f"{path.stem}-{number}-{os.getpid()}-{time.monotonic_ns()}.mp4")
    os.link(path, linked)
    return linked


def measure_bare(clips: list[Clip], times: list[list[int]]) -> float:
    """CPU milliseconds a clip of decoding in a loop."""
    started = time.process_time()
    for clip, wanted_times in zip(clips, times, strict=True):
        decode_bare(clip.video, wanted_times)
    return 1e3 * (time.process_time() - started) / len(clips)


def measure_handover(clip: Clip, count: int, copies: bool) -> float:
    """Clips a second from two children that decode nothing, with or without a copy to a device."""
    slots = SharedSlots(slots_for(8, 2), 1 << 26, "frames", "")
    with DecodePool(VIDEO, 2, partial(decode_nothing, transform=EGOVLP_TRANSFORM), slots) as pool:
        feed(pool, [replace(clip, clip_id=f"warm{i}") for i in range(8)], None, copies)
        started = time.perf_counter()
        done, *_ = feed(pool, [replace(clip, clip_id=str(i)) for i in range(count)], None, copies)
        return done / (time.perf_counter() - started)


def measure_writing(folder: Path, rounds: int, clips: int) -> dict[str, float]:
    """Milliseconds a clip of bare writing and of a worker's writing, taking turns, best of each, and their ratio."""
    import torch

    from egopatch.extract.writing.shard_writer import BackgroundShardWriter, EncodedShard
    from egopatch.features import Fingerprint, ShardWork, StoreSpec, create_store

    spec = StoreSpec.for_patches(frames=16, grid=(14, 14), width=768, dtype="float16", shard=clips)
    shapes = {array.name: array.shape for array in spec.arrays}
    patches = torch.randn(shapes["patches"]).half()
    row = {name: patches if name == "patches" else torch.randn(shape) for name, shape in shapes.items()}
    rows = [{name: tensor.clone() for name, tensor in row.items()} for _ in range(clips)]
    bare = stored = cpu = float("inf")
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for number in range(rounds + 1):
            started = time.perf_counter()
            for shard in range(SHARDS):
                with (Path(root) / f"bare{shard}").open("wb", buffering=0) as file:
                    for tensors in rows:
                        file.write(tensors["patches"].numpy().data)
                    os.fsync(file.fileno())
            took = time.perf_counter() - started
            for shard in range(SHARDS):
                (Path(root) / f"bare{shard}").unlink()
            ids = [f"c{i}" for i in range(SHARDS * clips)]
            store = create_store(Path(root) / "store", spec, Fingerprint({"benchmark": "feed"}), ids)
            started, used = time.perf_counter(), time.process_time()
            with BackgroundShardWriter(store, max_errors=0) as writer:
                for work, names in writer.leases([ShardWork(i, tuple(ids)) for i in range(SHARDS)]):
                    named = dict(zip(names, rows, strict=True))
                    writer.write(EncodedShard(work, "", named, dict.fromkeys(names, "sha")))
                writer.wait()
            if number:  # the first round is slower
                bare, stored = min(bare, took), min(stored, time.perf_counter() - started)
                cpu = min(cpu, time.process_time() - used)
            shutil.rmtree(Path(root) / "store")
    written = SHARDS * clips
    return {
        "bare_ms": 1e3 * bare / written,
        "store_ms": 1e3 * stored / written,
        "cpu_ms": 1e3 * cpu / written,
        "share": bare / stored,
    }


def measure_kind(kind: Kind, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    count = 2 if options.quick else CLIPS[kind.name]
    made = [write_video(folder / f"{kind.width}-{i}.mp4", kind, i) for i in range(min(count, 4))]
    clips = [Clip(f"{i}", made[i % len(made)]) for i in range(count)]
    times = [wanted(clip.video, VIDEO.frames) for clip in clips]
    bare, device, host = [], [], []
    for _ in range(options.rounds):
        bare.append(measure_bare(clips, times))
        device.append(measure_feed(clips, 2, planes=True, rate=options.encoder_rate))
        host.append(measure_feed(clips, 1, planes=False, rate=options.encoder_rate))

    def least(runs: list[dict[str, float]]) -> dict[str, float]:
        return min(runs, key=lambda run: run["children_ms"] + run["parent_ms"])

    handed = 20 if options.quick else HANDED
    with_copy, without = (max(measure_handover(clips[0], handed, copies) for _ in range(2)) for copies in (True, False))
    return {
        "bare_ms": min(bare),
        "device": least(device),
        "host": least(host),
        "handover_clips_per_s": without,
        "handover_and_copy_clips_per_s": with_copy,
    }


def forecast(parts: dict[str, Any], row_mb: float) -> dict[str, Any]:
    """Clips a second of each stage on a node, and the stage that limits the rate."""
    found = {}
    for name, part in parts.items():
        device = part["device"]
        stages = {
            "decoding": NODE_CORES * 1e3 / (device["children_ms"] + device["parent_ms"]),
            "hand-over": 1e3 / device["serial_ms"],
            "encoder": H100_CLIPS_PER_S,
            "disk": NODE_DISK_GB_PER_S * 1e3 / row_mb,
        }
        bound = min(stages, key=stages.__getitem__)
        found[name] = {"clips_per_s": stages[bound], "bound": bound, "ceilings": stages}
    return {
        "assumes": f"{NODE_CORES} cores as fast as this machine's and shared by children and parent; an H100 at"
        f" {H100_CLIPS_PER_S:g} clips/s (depth 6, half of its bfloat16 rate); a disk of {NODE_DISK_GB_PER_S:g} GB/s",
        "kinds": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="best of so many, of decoding and hand-over")
    parser.add_argument("--encoder-rate", type=float, default=None, help="clips/s of the encoder; default: no limit")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to write to")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_result_arguments(parser, "feed.json", "few clips of the smallest kind")
    options = parser.parse_args()
    request_huge_pages()  # as the commands do, before anything imports torch
    if options.quick:
        options.rounds = 1
    kinds = KINDS[:1] if options.quick else KINDS
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        parts = {kind.name: measure_kind(kind, Path(folder), options) for kind in kinds}
    places = {"disk": options.folder, "memory": Path("/dev/shm")}
    written = {
        name: measure_writing(place, 2 if options.quick else WRITTEN, 4 if options.quick else SHARD)
        for name, place in places.items()
    }

    def ratio(part: dict[str, Any], where: str) -> float:
        return (part[where]["children_ms"] + part[where]["parent_ms"]) / part["bare_ms"]

    result = {
        "cpu_ratio": {name: ratio(part, "device") for name, part in parts.items()},
        "cpu_ratio_host": {name: ratio(part, "host") for name, part in parts.items()},
        "serial_ms": {name: part["device"]["serial_ms"] for name, part in parts.items()},
        "write_share": {name: found["share"] for name, found in written.items()},
        **{key: {name: part[key] for name, part in parts.items()} for key in HANDOVER},
        "copies": "2: from the decoder's frames to shared memory, which cuts them, and from there to the device",
        "parts_ms": parts,
        "writing_ms": written,
        "forecast": forecast(parts, row_mb=4.83),
        "machine": stamp("av"),
    }
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        for key in ("cpu_ratio", "cpu_ratio_host", "serial_ms", "write_share", *HANDOVER):
            print(f"{key}: {', '.join(f'{name}: {value:.2f}' for name, value in result[key].items())}")
    write_result(options, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
