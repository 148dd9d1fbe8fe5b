"""A training step of psa on a GPU: time, launches, and how busy the GPU is, for one head and for 24 stacked heads.

One head's step is measured with and without the CUDA graph that `train fit` makes of it.

    python benchmarks/gpu_step.py [--clips 120] [--questions 17] [--steps 20] [--out FILE.json] [--quick]

Features are made up (`sweep_cost.py` writes them) and kept where `train.residency` says, on the GPU if they fit. A step
is one batch of about --batch questions: forward, backward, clipping and AdamW, as `train fit` makes it. The GPU's busy
share is the profiler's sum of kernel times over the wall time of the same steps without the profiler; launches are
counted by the profiler. `--quick` and machines without a GPU take tiny sizes on the CPU.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._machine import add_result_arguments, stamp, write_result
from benchmarks.sweep_cost import RATIOS, SEEDS, write_config, write_data
from egopatch.configs.command_line import load_config
from egopatch.configs.schema import Config
from egopatch.train.data.batch_size import BatchSize
from egopatch.train.data.question_table import plan_batches
from egopatch.train.fitting.experiment import Experiment, open_experiment
from egopatch.train.fitting.run_group import RunGroup
from egopatch.train.rundir import run_folder
from egopatch.train.rundir.names import LAST

LAUNCHES = ("cudaGraphLaunch", "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
PROFILED = 5


def member(config: Config, ratio: float, seed: int) -> Config:
    """Config of the run with one ratio and seed."""
    folder = config.run.dir.parent / f"ratio{ratio:g}_seed{seed}"
    return replace(
        config,
        head=replace(config.head, ratio=ratio),
        train=replace(config.train, seed=seed),
        run=replace(config.run, dir=folder),
    )


class Steps:
    """Steps of a group of runs, one after another, over as many epochs as it takes."""

    def __init__(self, configs: list[Config], experiment: Experiment, captured: bool) -> None:
        for config in configs:
            run_folder.claim(config.run.dir, config)
        self.experiment = experiment
        self.group = RunGroup(configs, experiment, configs[0].run.dir / LAST)
        self.plan = plan_batches(experiment.train_table, configs[0].train.batch, 0)
        most = configs[0].train.batch
        self.size = BatchSize.covering(experiment.train_table, self.plan, most) if captured else None

    def take(self, steps: int) -> None:
        """Learn from `steps` batches, and wait until the device has done them."""
        while steps:
            plan = self.plan[:steps]
            for batch in self.experiment.features.stream(self.experiment.train_table, plan, self.size):
                self.group.learn(batch, last=False)
            steps -= len(plan)
        if self.experiment.device.type == "cuda":
            torch.cuda.synchronize()


def measure(configs: list[Config], experiment: Experiment, steps: int, captured: bool) -> dict[str, Any]:
    """Milliseconds, launches and busy share of a step."""
    run = Steps(configs, experiment, captured)
    run.take(4)
    started = time.perf_counter()
    run.take(steps)
    wall = (time.perf_counter() - started) / steps
    cuda = experiment.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        run.take(PROFILED)
    events = profiler.key_averages()
    run.group.close()
    found = {"heads": len(configs), "captured": captured, "milliseconds": wall * 1e3}
    if not cuda:
        return found | {"operators": sum(event.count for event in events if event.key.startswith("aten::")) / PROFILED}
    busy = kernel_microseconds(events) / PROFILED / 1e6
    waits = sum(event.count for event in events if event.key == "cudaStreamSynchronize")
    return found | {
        "gpu_milliseconds": busy * 1e3,
        "busy_share": busy / wall,
        "launches": sum(event.count for event in events if event.key in LAUNCHES) / PROFILED,
        "waits": waits / PROFILED,
    }


def kernel_microseconds(events: Iterable[Any]) -> float:
    """Sum of the kernels' times. Operators, and annotations such as that of the optimiser's step, carry them too."""
    kernels = (event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    return sum(event.self_device_time_total for event in kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--questions", type=int, default=17, help="questions of each clip")
    parser.add_argument("--batch", type=int, default=1088, help="questions of a step")
    parser.add_argument("--steps", type=int, default=20)
    add_result_arguments(parser, None, "tiny sizes on the CPU")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.quick
    args.frames, args.side, args.width = (16, 14, 768) if cuda else (4, 6, 32)
    if not cuda:
        args.clips, args.batch, args.steps = 12, 64, 2
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root, args)
        path = write_config(root, args, args.batch, 1000)
        text = yaml.safe_load(path.read_text())
        text["train"]["device"] = "cuda" if cuda else "cpu"
        text["head"]["width"] = 256 if cuda else 32
        path.write_text(yaml.safe_dump(text))
        config = load_config(path)
        experiment = open_experiment(config)
        stacked = [member(config, ratio, seed) for ratio in RATIOS for seed in SEEDS]
        work = (([config], False), ([config], True), (stacked, True))
        results = [measure(configs, experiment, args.steps, captured) for configs, captured in work]
    for row in results:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "result")}
    result = {"settings": settings, "steps": results, "machine": stamp("triton")}
    write_result(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
