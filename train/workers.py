"""Crews side by side on the cores of a CPU."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """Threads of which each takes whole crews; a context manager.

    A light head's operations are too small to be cut: two threads that share each of them wait for one another most of
    the time, and for anything else that runs on the machine. Inside the context every operation runs on one thread
    alone, and results do not depend on how many workers there are.

    Args:
        threads: that work; without any, items are taken in turn and operations cut as torch cuts them.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self._threads is not None:
            self._cut = torch.get_num_threads()
            torch.set_num_threads(1)  # new threads take it over
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="crew")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self._cut)

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work` of each item, in order; raises what the first one raised."""
        if self._pool is None:
            return [work(item) for item in items]
        return list(self._pool.map(work, items))


IN_TURN = Workers()
