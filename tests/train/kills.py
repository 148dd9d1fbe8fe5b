"""Training with other processes and signals: what happens after a batch, kills, and folders that others hold."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from egopatch.features.io import file_lease
from egopatch.train.data.batch import Batch
from egopatch.train.fitting.run_group import RunGroup
from tests.train.tiny import clock


class Killed(BaseException):
    """Stands for a kill."""


@contextmanager
def after_each_batch(act: Callable[[RunGroup], object]) -> Iterator[None]:
    """Inside the block, call `act` whenever a run group has learned from a batch."""
    real = RunGroup.learn

    def learn(self: RunGroup, batch: Batch, last: bool) -> None:
        real(self, batch, last)
        act(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunGroup, "learn", learn)
        yield


def killed_after(step: int, train: Callable[[], object]) -> None:
    """Call `train` until a run group has made `step`, as a process that is killed there."""

    def die(group: RunGroup) -> None:
        if group.heads.step == step:
            raise Killed

    with after_each_batch(die), pytest.raises(Killed):
        train()


@contextmanager
def held(folder: Path, waits: ModuleType, meanwhile: Callable[[], object] = lambda: None) -> Iterator[list[float]]:
    """Inside the block another process holds `folder`: when `waits` sleeps for the third time, it ends with
    `meanwhile`.

    Gives the seconds of each sleep.
    """
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            meanwhile()
            other.close()

    with ExitStack() as other, pytest.MonkeyPatch.context() as patch:
        other.enter_context(file_lease.hold(folder, 0))
        patch.setattr(waits, "time", clock(sleep))
        yield slept
