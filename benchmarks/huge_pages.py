"""Time encoding on a CPU with and without huge pages under torch's tensors, which the commands ask for.

    python benchmarks/huge_pages.py [--clips 4] [--rounds 3] [--quick] [--out FILE]

Each measurement is a process of its own, because torch reads the setting once; the two settings take turns, and the
best round of each counts. A process encodes clips of 16 frames one by one, as one core does for a store. The weights of
EgoVLPv2 are random, which does not change the work.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs without being installed

from benchmarks._machine import add_result_arguments, stamp, write_result  # noqa: E402

NETWORKS = {"lite": 11, "egovlpv2": 6}  # depth of each
SETTINGS = {"pages of 4 KB": "0", "huge pages": "1"}
FRAMES, SIDE = 16, 224


def encode(arch: str, clips: int) -> dict[str, float]:
    """Seconds and page faults of a clip."""
    # Imported here, because torch reads the setting when it is imported.
    import torch

    from benchmarks.encoder import Work, checkpoint
    from egopatch.extract.encoders import load_video_encoder, open_checkpoint

    torch.set_num_threads(1)
    weights = open_checkpoint(arch, None) if arch == "lite" else checkpoint(Work(FRAMES, NETWORKS[arch], 1))
    encoder = load_video_encoder(arch, weights, FRAMES, NETWORKS[arch]).eval()
    encoder.pack()
    frames = torch.rand(1, FRAMES, 3, SIDE, SIDE)
    with torch.inference_mode():
        encoder(frames)
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        for _ in range(clips):
            encoder(frames)
        seconds = time.process_time() - started
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {"cpu_s": seconds / clips, "page_faults": faults / clips}


def measure(arch: str, setting: str, clips: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--encode", arch, "--clips", str(clips)]
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": SETTINGS[setting]}
    found: dict[str, float] = json.loads(subprocess.check_output(command, env=environment, text=True))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4, help="clips that each process encodes")
    parser.add_argument("--rounds", type=int, default=3, help="best of")
    parser.add_argument("--encode", choices=NETWORKS, help=argparse.SUPPRESS)
    add_result_arguments(parser, "huge_pages.json", "one clip and one round of the smaller network")
    options = parser.parse_args()
    if options.encode:
        print(json.dumps(encode(options.encode, options.clips)))
        return 0
    if options.quick:
        options.clips = options.rounds = 1
    result: dict[str, Any] = {}
    for arch in ["lite"] if options.quick else NETWORKS:
        runs = [{name: measure(arch, name, options.clips) for name in SETTINGS} for _ in range(options.rounds)]
        result[arch] = {name: min((run[name] for run in runs), key=lambda run: run["cpu_s"]) for name in SETTINGS}
        small, huge = (result[arch][name]["cpu_s"] for name in SETTINGS)
        result[arch]["times_as_fast"] = small / huge
        print(f"{arch}: {small:.2f} s of CPU time a clip, {huge:.2f} s with huge pages")
    write_result(options, result | {"machine": stamp()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
