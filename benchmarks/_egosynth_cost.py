"""Measures the cost of a system's training step on EgoSynth."""

import time

import numpy as np
import torch

from egopatch.configs.schema import Config
from egopatch.features.values.dtypes import spec_row_bytes
from egopatch.train.data.question_table import plan_batches
from egopatch.train.fitting.build_heads import build_stacked_heads
from egopatch.train.fitting.experiment import open_experiment

# Number of training steps; the cost is their median.
TIMED_STEPS = 40


def cost_of(config: Config) -> dict[str, float]:
    """Cost of a single seed: median CPU milliseconds of a training step on one core, and the kilobytes that the head
    reads for a clip. Empty for a head that learns nothing.

    Other work on the machine changes CPU time less than wall time.
    """
    experiment = open_experiment(config)
    head = build_stacked_heads([config], experiment)
    if not head.steps:
        return {}
    plan = plan_batches(experiment.train_table, config.train.batch, config.train.seed, 0)[:TIMED_STEPS]
    took, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for batch in experiment.features.stream(experiment.train_table, plan):
        start = time.process_time()
        head.learn(batch)
        took.append(time.process_time() - start)
    torch.set_num_threads(threads)
    store = experiment.features.store
    read = 0 if store is None else spec_row_bytes(store.spec)
    return {"cpu_ms_a_step": round(1000 * float(np.median(took)), 1), "kb_a_clip": round(read / 1000, 1)}
