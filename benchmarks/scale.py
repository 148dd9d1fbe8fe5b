"""A million clips with a fake encoder: do planning, leases, commits, the ledger and status stay fast, and memory flat?

    python benchmarks/scale.py [--clips 1000000] [--folder FOLDER] [--quick] [--out FILE]

The store has the default 64 clips to a shard and a real job's ids, fingerprint and ledger; a clip's tensors are a few
bytes, so that nothing but the bookkeeping is measured. FOLDER is in memory by default (/dev/shm), because a disk's
syncs take longer than all the rest. `plan` and `status` are the commands, each in a process of its own, imports
included. Exit code 1 where a figure to reach is missed.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402
from egopatch.configs.command_line import ConfigParser, parse_config  # noqa: E402
from egopatch.configs.schema import Config  # noqa: E402
from egopatch.extract.worker.job import resolve_job  # noqa: E402
from egopatch.features import StoreSpec, create_store, open_store  # noqa: E402
from egopatch.features.state.origin import Origin  # noqa: E402

SPEC = StoreSpec.for_patches(frames=1, grid=(1, 1), width=1, shard=64)
ROW = {"patches": torch.ones(1, 1, 1), "cls": torch.ones(1), "saliency": torch.ones(1, 1), "timestamps": torch.ones(1)}
CLIPS_TO_A_VIDEO = 10
MACHINE = "x86_64 CPU, AVX512, torch 2.13.0+cpu"
SEGMENTS = 10
LOOK_S = 0.02


def annotate(folder: Path, clips: int) -> list[str]:
    """Write the clips, and a few questions, as a user's own data set; returns the ids."""
    ids = [f"video{n // CLIPS_TO_A_VIDEO:07d}|P1|{n * 3 % 997}|{n}" for n in range(clips)]
    with (folder / "clips.jsonl").open("w") as file:
        for n, clip_id in enumerate(ids):
            video = f"videos/video{n // CLIPS_TO_A_VIDEO:07d}.mp4"
            file.write(json.dumps({"clip_id": clip_id, "video": video, "start_s": float(n), "end_s": n + 5.0}) + "\n")
    with (folder / "questions.jsonl").open("w") as file:
        for n, clip_id in enumerate(ids[:1000]):
            asked = {"question_id": n, "clip_id": clip_id, "question": "what is opened?", "answer": "fridge"}
            file.write(json.dumps({**asked, "part": "train"}) + "\n")
    return ids


def configure(folder: Path) -> tuple[Path, Config]:
    """A config for that data set, with a tiny checkpoint."""
    path = folder / "scale.yaml"
    path.write_text(
        f"""data:    {{name: jsonl, root: {folder}, clips: {folder}/clips.jsonl, questions: {folder}/questions.jsonl}}
video:   {{frames: 1, size: 32}}
encoder: {{arch: egovlpv2, checkpoint: {folder}/tiny.pth, depth: 2, path: fused, dtype: float32}}
text:    {{model: {folder}/tokenizer}}
store:   {{path: {folder}/store, shard: {SPEC.shard}}}
run:     {{dir: {folder}/run}}
"""
    )
    command("standin", path)
    config, _ = parse_config(ConfigParser(), ["--config", str(path)])
    return path, config


def command(name: str, config: Path, *options: str) -> tuple[str, dict[str, float]]:
    """Run `python -m extract NAME`; returns what it printed, and its seconds and largest MB."""
    started, peak = time.perf_counter(), 0
    child = subprocess.Popen(
        [sys.executable, "-m", "extract", name, "--config", str(config), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    # Not the system's count for ended children, which starts with this process's own memory.
    while child.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, psutil.Process(child.pid).memory_info().rss)
        time.sleep(LOOK_S)
    assert child.stdout is not None
    printed = child.stdout.read()
    if child.returncode != 0:
        raise RuntimeError(f"extract {name} ended with {child.returncode}: {printed}")
    return printed, {"seconds": time.perf_counter() - started, "max_mb": peak / 1e6}


def origin(clip_id: str) -> Origin:
    """Origin of a clip, as `annotate` writes it."""
    n = int(clip_id.rpartition("|")[2])
    return Origin(f"videos/video{n // CLIPS_TO_A_VIDEO:07d}.mp4", 0, float(n), n + 5.0)


def fill(config: Config, ids: list[str]) -> dict[str, object]:
    """Create the store and commit every shard, lease by lease; returns milliseconds a shard and MB by segment."""
    fingerprint = resolve_job(config).fingerprint
    started = time.perf_counter()
    store = create_store(config.store.path, SPEC, fingerprint, ids)
    created = time.perf_counter() - started
    shards = len(ids) // SPEC.shard
    ms, mb = [], []
    for segment in range(SEGMENTS):
        numbers = range(segment * shards // SEGMENTS, (segment + 1) * shards // SEGMENTS)
        started = time.perf_counter()
        for shard in numbers:
            with store.lease(shard) as uncommitted:
                rows = dict.fromkeys(uncommitted, ROW)
                sources = {clip_id: f"{hash(clip_id[:12]):064x}" for clip_id in rows}
                store.write_shard(
                    shard, rows, sources, {}, {n: origin(n) for n in rows}, {}, dict.fromkeys(rows, MACHINE)
                )
        ms.append(1000 * (time.perf_counter() - started) / len(numbers))
        mb.append(psutil.Process().memory_info().rss / 1e6)
    return {"create_s": created, "shards": shards, "lease_and_commit_ms": ms, "writer_mb": mb}


def reopen(path: Path) -> dict[str, float]:
    """Time and memory of a reader, in a process of its own."""
    started = time.perf_counter()
    store = open_store(path)
    opened = time.perf_counter() - started
    started = time.perf_counter()
    store.catalog.refresh()
    refreshed = time.perf_counter() - started
    return {
        "open_s": opened,
        "refresh_ms": 1000 * refreshed,
        "mb": psutil.Process().memory_info().rss / 1e6,
        "clips": len(store.clip_ids),
        "ledger_mb": (path / "ledger.jsonl").stat().st_size / 1e6,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    add_result_arguments(parser, "scale.json", "a thousand clips")
    parser.add_argument("--reopen", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reopen:
        print(json.dumps(reopen(options.reopen)))
        return 0
    if options.quick:
        options.clips = 1000
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        results: dict = {"machine": stamp("zarr"), "clips": options.clips, "folder": str(options.folder)}
        ids = annotate(folder, options.clips)
        path, config = configure(folder)
        _, results["plan_before"] = command("plan", path, "--probe", "0", "--json")
        results["fill"] = fill(config, ids)
        child = [sys.executable, __file__, "--reopen", str(config.store.path)]
        results["reader"] = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
        printed, results["status"] = command("status", path, "--json")
        _, results["status_without_annotations"] = command(
            "status", path, "--json", "--data.clips", str(folder / "gone")
        )
        assert json.loads(printed)["committed"] == results["fill"]["shards"] * SPEC.shard
        _, results["plan_after"] = command("plan", path, "--probe", "0", "--json")
    ms, mb = results["fill"]["lease_and_commit_ms"], results["fill"]["writer_mb"]
    figures = {
        "plan of a new store, s": (results["plan_before"]["seconds"], 30),
        "plan of the full store, s": (results["plan_after"]["seconds"], 30),
        "status, s": (results["status"]["seconds"], 2),
        "status without annotations, s": (results["status_without_annotations"]["seconds"], 2),
        "memory of plan, MB": (max(results[key]["max_mb"] for key in ("plan_before", "plan_after")), 1000),
        "memory of status, MB": (results["status"]["max_mb"], 1000),
        "memory of a reader, MB": (results["reader"]["mb"], 1000),
        "memory of the writer, MB": (max(mb), 1000),
        "last lease and commit over the first": (ms[-1] / ms[0], 1.5),
    }
    results["reached"] = {
        key: {"reached": value, "at_most": limit, "ok": value <= limit} for key, (value, limit) in figures.items()
    }
    write_result(options, results)
    print(
        json.dumps({key: results[key] for key in ("fill", "reader", "plan_before", "status", "plan_after")}, indent=1)
    )
    for key, entry in results["reached"].items():
        print(f"{'ok  ' if entry['ok'] else 'MISS'} {key}: {entry['reached']:.2f} (at most {entry['at_most']})")
    return 0 if options.quick or all(entry["ok"] for entry in results["reached"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
