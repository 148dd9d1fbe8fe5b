"""Where features are kept during training: on disk, in memory or on the GPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from egopatch.features import PatchTokens, Store
from egopatch.features.common.units import format_bytes
from egopatch.train.processes.distributed import ALONE, Distributed

Residency = Literal["disk", "ram", "gpu"]

# Fraction of the free memory that resident features may take before `auto` leaves them on disk.
MEMORY_SHARE = 0.5
_DESCRIPTIONS = {"disk": "on disk, read batch by batch", "ram": "in memory", "gpu": "on the GPU"}


def choose_residency(
    wanted: Residency | Literal["auto"], nbytes: int, device: torch.device, ranks: Distributed = ALONE
) -> tuple[Residency, str]:
    """Decide where to keep `nbytes` of features, shared equally by the ranks; returns that and a log line.

    Raises:
        ValueError: `wanted` is `gpu` without a CUDA device.
    """
    if wanted == "gpu" and device.type != "cuda":
        raise ValueError(f"train.residency is 'gpu' but the device is {device.type}; expected a CUDA device, or 'auto'")
    ram = psutil.virtual_memory().available // ranks.local_size
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    per_rank = nbytes / ranks.size
    fits: Residency = "gpu" if per_rank < MEMORY_SHARE * gpu else "ram" if per_rank < MEMORY_SHARE * ram else "disk"
    chosen = fits if wanted == "auto" else wanted
    free = f"{format_bytes(ram)} of memory free" + (f", {format_bytes(gpu)} on the GPU" if gpu else "")
    why = f"chosen: {free}" if wanted == "auto" else f"set by train.residency; {free}"
    if ranks.size > 1:
        why += f"; each of {ranks.size} ranks reads and keeps only its own clips, {format_bytes(per_rank)}"
    return chosen, f"features: {format_bytes(nbytes)} kept {_DESCRIPTIONS[chosen]} ({why})"


@dataclass(frozen=True)
class ClipsInMemory:
    """In-memory clips that `read_ahead` can read like a store, so that a GPU copies them from pinned memory.

    Attributes:
        tokens: Tokens of all clips, on the CPU.
        rows: Row of each clip.
        store: The store that they were read from.
    """

    tokens: PatchTokens
    rows: Mapping[str, int]
    store: Store

    def buffers(self, rows: int, pin: bool = False) -> PatchTokens:
        """As `Store.buffers`."""
        return self.store.buffers(rows, pin)

    def read(self, ids: Sequence[str], *, out: PatchTokens, threads: int) -> PatchTokens:
        """As `Store.read`, except that torch chooses the number of threads."""
        rows, buffers = torch.tensor([self.rows[name] for name in ids], dtype=torch.long), out.tensors()
        for name, tensor in self.tokens.tensors().items():
            buffers[name] = torch.index_select(tensor, 0, rows, out=buffers[name][: len(rows)])
        return PatchTokens(**buffers)
