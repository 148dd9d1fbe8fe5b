"""Stage one whole on a GPU node: does it keep up with the slower of its encoder alone and bare decoding on all cores?

    python benchmarks/gpu_stage_one.py [--clips 6144] [--stored 3072] [--depth 6] [--batch 32] [--store FOLDER]
        [--out FILE] [--quick]

Videos are 320x240 H.264 of 2 s, a file a clip; the network has its published size and random weights, which do not
change the work. The job is run with a store that forgets what it gets, and then with one in /dev/shm, if there is room,
unless --store names another folder. The second is also compared with bare writing and fsync of the same bytes to the
same folder, by one thread and by as many as a worker has: the better of a measurement before and one after it. Before
that as many bytes are written and removed, because memory that a virtual machine uses for the first time is slower.
`steady` leaves out what comes before the first encoded batch. nvidia-smi samples the GPU's use.
Without a GPU (--quick, to see that it runs) a stand-in takes the same way on the CPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._feed_videos import KINDS, decode_many, wanted, write_video  # noqa: E402
from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402

# Decoder children import this file too, so whatever needs torch is imported where it is used.
if TYPE_CHECKING:
    import torch

    from egopatch.extract.feed.clips import PreparedClip
    from egopatch.extract.worker.job import ExtractionJob

KIND = KINDS[0]
SAMPLE_MS = 200
ROW_BYTES = 5_000_000
BARE_SHARDS = 3


class GpuUse:
    """Samples of (seconds, use of `device` in percent) while the block runs; none if it is no GPU."""

    def __init__(self, device: "torch.device") -> None:
        self._device = device
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> "GpuUse":
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}"]
        self._child = None
        if self._device.type == "cuda" and shutil.which(query[0]):
            import torch

            # nvidia-smi numbers the node's GPUs otherwise than torch, and without --id reports all of them.
            query.append(f"--id=GPU-{torch.cuda.get_device_properties(self._device).uuid}")
            self._child = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._child:
            self._child.terminate()
            lines = self._child.communicate()[0].splitlines()
            self.samples = [
                (round(i * SAMPLE_MS / 1e3, 1), int(line)) for i, line in enumerate(lines) if line.strip().isdigit()
            ]


class ChildCpu:
    """CPU seconds of the decoders and of the writing processes, sampled inside the block, since they end with the job.

    Decoders are the processes with a raised nice value.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, tuple[bool, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "ChildCpu":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def seconds(self, nice: bool) -> float:
        return sum(used for kind, used in self._seconds.values() if kind == nice)

    def _sample(self) -> None:
        own, me = os.nice(0), psutil.Process()
        while not self._stop.wait(SAMPLE_MS / 1e3):
            for child in me.children():
                with suppress(psutil.Error):
                    if "multiprocessing.spawn" in " ".join(child.cmdline()):
                        times = child.cpu_times()
                        self._seconds[child.pid] = child.nice() > own, times.user + times.system


def say(what: str) -> None:
    """Print what is known so far, in case the rest fails."""
    print(what, file=sys.stderr, flush=True)


def decoding_rate(paths: list[Path], frames: int, cores: int) -> float:
    """Clips a second of bare decoding, with one process per core."""
    times = wanted(paths[0], frames)
    parts = [paths[i :: 4 * cores] for i in range(4 * cores)]
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        list(pool.map(decode_many, [paths[:1]] * (2 * cores), [times] * (2 * cores)))  # the children have started
        started = time.perf_counter()
        done = sum(pool.map(decode_many, parts, [times] * len(parts)))
        return done / (time.perf_counter() - started)


def encoding_rate(job: "ExtractionJob", prepared: "list[PreparedClip]", seconds: float) -> float:
    """Clips a second of the encoder alone, from pixels in shared memory to rows in pinned memory, one batch ahead."""
    with job.open_batch_encoder() as encoder:

        def start() -> Callable[[], object]:
            for i in range(encoder.size):
                encoder.add(prepared[i % len(prepared)])
            return encoder.start()

        for _ in range(3):
            start()()
        started, done, finish = time.perf_counter(), 0, start()
        while not done or time.perf_counter() - started < seconds:
            following = start()
            finish()
            finish, done = following, done + encoder.size
        elapsed = time.perf_counter() - started
        finish()
        return done / elapsed


def writing_rate(root: Path, row_bytes: int, shard: int, threads: int, shards: int) -> tuple[float, float]:
    """Write and sync files of `shard` rows, `shards` files per thread; returns clips/s and CPU milliseconds a clip."""
    row = bytes(row_bytes)

    def write(thread: int) -> None:
        for number in range(shards):
            with (root / f"{thread}-{number}").open("wb", buffering=0) as file:
                for _ in range(shard):
                    file.write(row)
                os.fsync(file.fileno())

    root.mkdir()
    cpu, started = time.process_time(), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    took, cpu, clips = time.perf_counter() - started, time.process_time() - cpu, threads * shards * shard
    shutil.rmtree(root)
    return clips / took, 1e3 * cpu / clips


def fill_and_empty(root: Path, nbytes: int, threads: int) -> None:
    """Write files of `nbytes` bytes in total, and remove them."""
    block = bytes(1 << 24)

    def write(thread: int) -> None:
        with (root / str(thread)).open("wb", buffering=0) as file:
            for _ in range(-(-nbytes // threads // len(block))):
                file.write(block)

    root.mkdir()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    shutil.rmtree(root)


def run_job(job: "ExtractionJob", paths: list[Path], root: Path, decoders: int, forget: bool) -> dict[str, Any]:
    """The whole pipeline; its rate counts from the first decoded clip to the last commit."""
    from egopatch.extract.datasets import Clip
    from egopatch.extract.worker.pipeline import encode_shards
    from egopatch.features import Fingerprint, create_store

    clips = {f"clip{i:05d}": Clip(f"clip{i:05d}", path) for i, path in enumerate(paths)}
    store = create_store(root / "store", job.spec, Fingerprint({"benchmark": "gpu_stage_one"}), list(clips))
    if forget:
        store.write_shard = lambda *_, **__: None  # type: ignore[method-assign]
    cpu, main, started = time.process_time(), time.thread_time(), time.perf_counter()
    progress: list[tuple[float, int]] = []
    with GpuUse(job.device) as use, ChildCpu() as children:
        stats = encode_shards(
            job,
            store,
            store.missing_shards(),
            clips,
            decoders,
            lambda count, _: progress.append((time.perf_counter() - started, count)),
        )
    cpu, main = time.process_time() - cpu, time.thread_time() - main
    shutil.rmtree(root / "store")
    assert stats.committed == len(clips), stats
    stages = stats.stages
    (first_s, first_clips), (last_s, _) = progress[0], progress[-1]
    return {
        "clips_per_s": len(clips) / (stages.total_s - stages.start_s),
        "steady_clips_per_s": (len(clips) - first_clips) / (last_s - first_s),
        "first_batch_after_first_clip_s": first_s - stages.start_s,
        "parent_cpu_ms_per_clip": 1e3 * cpu / len(clips),
        "parent_main_thread_cpu_ms_per_clip": 1e3 * main / len(clips),
        "decoders_cpu_ms_per_clip": 1e3 * children.seconds(nice=True) / len(clips),
        "writers_cpu_ms_per_clip": 1e3 * children.seconds(nice=False) / len(clips),
        "stages_s": asdict(stages),
        "gpu_use_percent": use.samples,
    }


def make_job(options: argparse.Namespace, root: Path) -> "ExtractionJob":
    import torch

    from benchmarks.encoder import GRID, PATCH, Work, checkpoint
    from egopatch.configs.schema import Config, EncoderConfig, StoreConfig, VideoConfig
    from egopatch.extract.encoders import find_network, load_video_encoder
    from egopatch.extract.video.transforms import EGOVLP_TRANSFORM
    from egopatch.extract.worker.device import device_of
    from egopatch.extract.worker.job import ExtractionJob
    from egopatch.features.common.machine import has_bfloat16

    device = device_of("auto")
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if has_bfloat16(device) else "float32"
    config = Config(
        video=VideoConfig(frames=options.frames, size=GRID * PATCH),
        encoder=EncoderConfig(depth=options.depth, dtype=dtype, batch=options.batch),
        store=StoreConfig(path=root / "store", shard=options.shard),
    )
    weights = checkpoint(Work(options.frames, options.depth, 1))
    encoder = load_video_encoder("egovlpv2", weights, options.frames, options.depth, dtype=getattr(torch, dtype))
    if device.type == "cpu":
        assert options.quick, "torch sees no CUDA device here; --quick runs a stand-in on the CPU"
        ExtractionJob.encodes_on_device = True  # type: ignore[assignment, method-assign]
    return ExtractionJob(config, find_network("egovlpv2"), device, weights, encoder, EGOVLP_TRANSFORM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=6144)
    parser.add_argument("--stored", type=int, default=3072, help="clips of the job with a store")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shard", type=int, default=64)
    parser.add_argument("--store", type=Path, default=None, help="folder to write the store in")
    add_result_arguments(parser, None, "eight clips, one block, a GPU or none")
    options = parser.parse_args()
    if options.quick:
        options = argparse.Namespace(
            **vars(options) | {"clips": 8, "stored": 8, "frames": 2, "depth": 1, "batch": 9, "shard": 4}
        )
    cores = len(os.sched_getaffinity(0))
    if options.store is None:
        memory = Path("/dev/shm")
        needed = 2 * options.stored * ROW_BYTES
        roomy = min(shutil.disk_usage(memory).free, psutil.virtual_memory().available) > needed
        options.store = memory if roomy else Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory() as videos, tempfile.TemporaryDirectory(dir=options.store) as stores:
        with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
            count = min(64, options.clips)
            made = [Path(videos) / f"made{i}.mp4" for i in range(count)]
            list(pool.map(write_video, made, [KIND] * count, range(count)))
        paths = [Path(videos) / f"{i}.mp4" for i in range(options.clips)]
        for i, path in enumerate(paths):
            path.hardlink_to(made[i % count])
        say("videos written")
        decoding = decoding_rate(paths[:2048], options.frames, cores)
        say(f"bare decoding: {decoding:.1f} clips/s on {cores} cores")

        from egopatch.extract.datasets import Clip
        from egopatch.extract.feed.clips import PreparedClip
        from egopatch.extract.writing.shard_writer import shards_at_once
        from egopatch.features.values.dtypes import spec_row_bytes

        job = make_job(options, Path(stores))
        say("network loaded")
        with job.open_decoders(cores, 2 * cores + 8) as pool:
            found = pool.map([Clip(str(i), path) for i, path in enumerate(paths[:8])])
            prepared = [replace(one, release=list) for one in found if isinstance(one, PreparedClip)]
            encoding = encoding_rate(job, prepared, 0.1 if options.quick else 4.0)
        say(f"encoder alone: {encoding:.1f} clips/s")
        forgetting = run_job(job, paths, Path(stores), cores, forget=True)
        say(f"pipeline without a store: {forgetting}")
        row_bytes, writers = spec_row_bytes(job.spec), shards_at_once()
        bare: dict[str, list[tuple[float, float]]] = {"1 thread": [], f"{writers} threads": []}

        def measure_bare() -> None:
            for (name, rates), threads in zip(bare.items(), (1, writers), strict=True):
                rates.append(writing_rate(Path(stores) / "bare", row_bytes, options.shard, threads, BARE_SHARDS))
                rate, cpu_ms = rates[-1]
                say(f"bare writing, {name}: {rate:.1f} clips/s, {rate * row_bytes / 1e9:.2f} GB/s, {cpu_ms:.2f} ms CPU")

        fill_and_empty(Path(stores) / "used", options.stored * row_bytes, cores)
        measure_bare()
        storing = run_job(job, paths[: options.stored], Path(stores), cores, forget=False)
        say(f"pipeline with a store: {storing}")
        measure_bare()
    least = min(decoding, encoding)
    writing, writing_ms = max(found for rates in bare.values() for found in rates)
    result = {
        "encoder_alone_clips_per_s": encoding,
        "bare_decoding_clips_per_s": decoding,
        "bare_writing_clips_per_s_and_cpu_ms": bare,
        "bare_decoding_and_writing_on_the_same_cores_clips_per_s": cores / (cores / decoding + writing_ms / 1e3),
        "row_mb": row_bytes / 1e6,
        "share_of_the_slower": {
            "with a store": storing["clips_per_s"] / min(least, writing),
            "without a store": forgetting["clips_per_s"] / least,
        },
        "steady_share_of_the_slower": {
            "with a store": storing["steady_clips_per_s"] / min(least, writing),
            "without a store": forgetting["steady_clips_per_s"] / least,
        },
        "pipeline": storing,
        "pipeline_without_store": forgetting,
        "work": {key: str(value) for key, value in vars(options).items() if key not in ("out", "result")}
        | asdict(KIND),
        "machine": stamp("av"),
    }
    print(json.dumps(result, indent=1))
    write_result(options, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
