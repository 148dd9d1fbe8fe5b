"""The processes of one training: which of them this is, and the few things that they do together.

`torchrun` starts the ranks. Each works on the questions of the clips that it owns (`rank_slice`); what they find is
added up, so that all of them hold the same weights and take the same decisions. Only the first one writes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class RankLost(ConnectionError):
    """Another rank ended in the middle of the work."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of one training.

    Attributes:
        rank: of this process; rank 0 is the first one.
        size: how many there are.
        local: number of this process on its machine.
        local_size: how many there are on its machine.

    Raises:
        RankLost: from every method, where another rank is gone.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, once."""
        if self.first:
            print(text, flush=True)

    def share(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank; what it raises there is raised on every rank."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = work()
            except Exception as error:
                told[1] = error
        with self._together():
            dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Put the first rank's values into every rank's tensors."""
        if self.size > 1:
            with self._together(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        with self._together():
            dist.all_reduce(flags)
        return bool(flags)

    def add_up(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Sums over the ranks of tensors in the shapes of `like`; None counts as zero, and stays where all have none.

        All of them cross in one piece: the gradients of a head are many small tensors.
        """
        present = torch.tensor([t is not None for t in tensors], dtype=like[0].dtype, device=like[0].device)
        pieces = [torch.zeros_like(other) if t is None else t for t, other in zip(tensors, like, strict=True)]
        flat = torch.cat([present, *(piece.detach().flatten() for piece in pieces)])
        with self._together():
            dist.all_reduce(flat)
        counts, *sums = flat.split([len(pieces), *(piece.numel() for piece in pieces)])
        return [
            total.view(other.shape) if count else None
            for count, total, other in zip(counts.tolist(), sums, like, strict=True)
        ]

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            raise RankLost(
                f"rank {self.rank} of {self.size} lost the others ({reason}); one of them failed or was killed. "
                "Give the same command again to go on from the last saved place"
            ) from None


ALONE = Ranks()


@contextmanager
def join(cuda: bool) -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone.

    Args:
        cuda: whether tensors are on CUDA devices, one a rank.

    Raises:
        ValueError: more ranks on this machine than it has CUDA devices.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    numbers = [int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    ranks = Ranks(numbers[0], size, numbers[1], numbers[2])
    if cuda:
        devices = torch.cuda.device_count()
        if ranks.local_size > devices:
            raise ValueError(
                f"torchrun started {ranks.local_size} ranks on this machine, which has {devices} CUDA devices; "
                f"expected --nproc-per-node {devices} at most, or --train.device cpu"
            )
        torch.cuda.set_device(ranks.local)
    # Its default arguments hold the group that there is when it is first imported. Let that be none: what holds the
    # group keeps gloo's threads alive, and these may touch Python while the interpreter ends, which aborts the process.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield ranks
    dist.destroy_process_group()  # after a failure the process ends anyway, and waiting for the others could hang
