"""Time stage one whole (decode, encode, write) against its encoder alone, with the share of each stage.

    python benchmarks/pipeline.py [--clips 32] [--seconds 5] [--depth 6] [--dtype auto] [--quick] [--out FILE]

Videos are 320x240 H.264 at 30 frames a second with B-frames; the network has its published size and random weights,
which do not change the work. The encoder is timed alone on decoded clips just before and just after the pipeline, so
that a machine that slows down meanwhile is seen, and the mean of the two is what the pipeline is held against. Its rate
is counted from the first decoded clip to the last commit: what it takes to start the children does not grow with a job.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402
from benchmarks.decode import Kind, write_video  # noqa: E402
from benchmarks.encoder import GRID, PATCH, Work, checkpoint  # noqa: E402
from egopatch.configs.schema import Config, EncoderConfig, EngineConfig, StoreConfig, VideoConfig  # noqa: E402
from egopatch.extract.datasets import Clip  # noqa: E402
from egopatch.extract.encoders import find_network, load_video_encoder  # noqa: E402
from egopatch.extract.feed.clips import PreparedClip  # noqa: E402
from egopatch.extract.feed.pool import decoder_count  # noqa: E402
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM  # noqa: E402
from egopatch.extract.worker.device import device_of  # noqa: E402
from egopatch.extract.worker.job import ExtractionJob  # noqa: E402
from egopatch.extract.worker.pipeline import encode_shards  # noqa: E402
from egopatch.features import Fingerprint, StoreSpec, create_store  # noqa: E402
from egopatch.features.common.machine import has_bfloat16  # noqa: E402


def encoder_alone(job: ExtractionJob, prepared: list[PreparedClip], clips: int) -> float:
    """Clips a second over `clips` clips, in the pipeline's own batches, with the next one queued behind each."""
    with job.open_batch_encoder() as encoder:

        def start() -> Callable[[], object]:
            for i in range(encoder.size):
                encoder.add(prepared[i % len(prepared)])
            return encoder.start()

        for _ in range(encoder.slow_batches):
            start()()
        rounds = max(clips // encoder.size, 1)
        started = time.perf_counter()
        finish = start()
        for _ in range(rounds - 1):
            following = start()
            finish()
            finish = following
        finish()
        return rounds * encoder.size / (time.perf_counter() - started)


def measure(config: Config, root: Path, clips: int, seconds: float) -> dict[str, object]:
    """Both rates, and where the pipeline's time went."""
    weights = checkpoint(Work(config.video.frames, config.encoder.depth, 1))
    network, device = find_network(config.encoder.arch), device_of(config.encoder.device)
    dtype = getattr(torch, config.encoder.dtype)
    encoder = load_video_encoder(network, weights, config.video.frames, config.encoder.depth, dtype=dtype)
    job = ExtractionJob(config, network, device, weights, encoder.eval(), EGOVLP_TRANSFORM)
    kind = Kind(320, 240, seconds)
    videos = [Clip(f"clip{i}", write_video(root / f"{i}.mp4", kind, seed=i)) for i in range(clips)]
    decoders = decoder_count(config, 1)
    with job.open_decoders(decoders, 2 * decoders + 4) as pool:
        # Not to be released: each is encoded several times.
        prepared = [replace(one, release=list) for one in pool.map(videos[:4]) if isinstance(one, PreparedClip)]
    spec = StoreSpec.for_patches(
        config.video.frames, encoder.grid, encoder.width, config.store.dtype, config.store.shard
    )
    ids = [clip.clip_id for clip in videos]
    store = create_store(config.store.path, spec, Fingerprint({"benchmark": "pipeline"}), ids, config.store.format)
    before = encoder_alone(job, prepared, clips // 2)
    stats = encode_shards(
        job,
        store,
        store.missing_shards(),
        {clip.clip_id: clip for clip in videos},
        decoders,
        lambda done, _: print(f"{done} more", file=sys.stderr, flush=True),
    )
    after = encoder_alone(job, prepared, clips // 2)
    assert stats.committed == clips
    stages = stats.stages
    alone, whole = (before + after) / 2, clips / (stages.total_s - stages.start_s)
    return {
        "claims": {"whole pipeline against the encoder alone (reach 0.95)": whole / alone},
        "encoder_clips_per_s": {"before": before, "after": after, "mean": alone},
        "pipeline_clips_per_s": whole,
        "share_of_total": {name: value / stages.total_s for name, value in asdict(stages).items() if name != "total_s"},
        "stages_s": asdict(stages),
        "decode_s_per_clip": stages.decode_s / clips,
        "write_s_per_clip": stages.write_s / clips,
        "said": str(stages),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each video")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shard", type=int, default=8)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    add_result_arguments(parser, "pipeline.json", "one block, eight clips")
    options = parser.parse_args()
    quick = {"clips": 8, "depth": 1, "frames": 4, "shard": 4} if options.quick else {}
    given = argparse.Namespace(**{**vars(options), **quick})
    fastest = "bfloat16" if has_bfloat16(device_of("auto")) else "float32"
    dtype = fastest if given.dtype == "auto" else given.dtype
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            video=VideoConfig(frames=given.frames, size=GRID * PATCH),
            encoder=EncoderConfig(depth=given.depth, dtype=dtype, batch=given.batch),
            store=StoreConfig(path=Path(folder) / "store", shard=given.shard),
            engine=EngineConfig(),
        )
        result = measure(config, Path(folder), given.clips, given.seconds)
    result["work"] = {**{name: vars(given)[name] for name in ("clips", "seconds", "frames", "depth")}, "dtype": dtype}
    result["machine"] = stamp("av")
    for name, value in result["claims"].items():  # type: ignore[attr-defined]
        print(f"{name}: {value:.3f}")
    print(result["said"])
    write_result(options, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
