"""The processes of one training: the rank of this process, and the few operations that all ranks do together.

`torchrun` starts the ranks. Each works on the questions about its own clips (`train.data.batch.RankSlice`); gradients
and results are summed, so all ranks hold the same weights and take the same decisions. Only the first rank writes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from egopatch.configs.schema import ConfigError
from egopatch.features.common.machine import usable_gpus
from egopatch.features.common.units import counted

T = TypeVar("T")


class RankLost(ConnectionError):
    """Another rank ended before the work was done."""


@dataclass(frozen=True)
class Distributed:
    """This process among the ranks of one training.

    Attributes:
        rank: Rank of this process; the first is 0.
        size: Number of ranks.
        local: Rank of this process on its machine.
        local_size: Number of ranks on its machine.

    Raises:
        RankLost: From every method, if another rank is gone.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and prints."""
        return self.rank == 0

    def print_once(self, text: str) -> None:
        """Print a line, on the first rank only."""
        if self.first:
            print(text, flush=True)

    def broadcast(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank; every rank returns its result, or raises its exception."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        with self._collective():
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Put the first rank's values into every rank's tensors."""
        if self.size > 1:
            with self._collective(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._collective():
            dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        with self._collective():
            dist.all_reduce(flags)
        return bool(flags)

    def sum_tensors(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """Sums over the ranks of tensors in the shapes and dtypes of `like`; None counts as zero; all None gives None.

        All tensors are sent as one: the gradients of a head are many small tensors. The CPUs exchange which tensors
        exist, because reading that from a GPU would wait for the whole batch.
        """
        counts = torch.tensor([int(t is not None) for t in tensors])
        pieces = [torch.zeros_like(other) if t is None else t for t, other in zip(tensors, like, strict=True)]
        flat = torch.cat([piece.detach().flatten() for piece in pieces])
        with self._collective():
            dist.all_reduce(counts)
            dist.all_reduce(flat)
        sums = flat.split([piece.numel() for piece in pieces])
        return [
            total.view(other.shape).to(other.dtype) if count else None
            for count, total, other in zip(counts.tolist(), sums, like, strict=True)
        ]

    @contextmanager
    def _collective(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            raise RankLost(
                f"rank {self.rank} of {self.size} lost contact with the others ({reason}); one of them failed or was "
                "killed. Run the same command again to resume from the last saved step"
            ) from None


ALONE = Distributed()


def _number(name: str, default: str = "") -> int:
    """The value of one of torchrun's variables."""
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"{name} is {text!r}; expected a whole number, as torchrun sets it: start with torchrun, or unset {name}"
        )
    return int(text)


@contextmanager
def join(cuda: bool) -> Iterator[Distributed]:
    """Join the ranks that torchrun started; without torchrun, this process alone.

    Args:
        cuda: Whether tensors are on CUDA devices, one per rank.

    Raises:
        ConfigError: This machine has more ranks than CUDA devices, or `WORLD_SIZE` is set without torchrun's other
            variables, or one of them is not a number or not a valid rank.
    """
    size = _number("WORLD_SIZE", "1")
    if size == 1:
        yield ALONE
        return
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    if absent := [name for name in names if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but {', '.join(absent)} is not set; start with torchrun, or unset WORLD_SIZE"
        )
    rank, local, local_size, _ = map(_number, names)
    if rank >= size or local >= local_size:  # the others would wait for a rank that does not exist
        raise ConfigError(
            f"RANK is {rank} of WORLD_SIZE {size}, and LOCAL_RANK {local} of LOCAL_WORLD_SIZE {local_size}; expected "
            "ranks below these numbers, as torchrun sets them: start with torchrun, or unset WORLD_SIZE"
        )
    ranks = Distributed(rank, size, local, local_size)
    if cuda:
        devices = usable_gpus()
        if ranks.local_size > devices:
            raise ConfigError(
                f"torchrun started {ranks.local_size} ranks on this machine, which has "
                f"{counted(devices, 'CUDA device')}; expected --nproc-per-node {devices} at most, or --train.device cpu"
            )
        torch.cuda.set_device(ranks.local)
    # The default arguments of this module keep whatever process group exists at its first import. Import it before
    # there is one: a reference to the group keeps gloo's threads alive, and these may use Python while the
    # interpreter exits, which aborts the process.
    from torch.distributed.nn import functional  # noqa: F401

    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield ranks
    dist.destroy_process_group()  # after a failure the process ends anyway, and waiting for the others could hang
