"""Training that is killed: the process gets no chance to clean up or to save."""

from collections.abc import Callable

import pytest

from egopatch.train.data.batch import Batch
from egopatch.train.fitting.run_group import RunGroup


class Killed(BaseException):
    """Stands for a kill."""


def killed_after(monkeypatch: pytest.MonkeyPatch, step: int, train: Callable[[], object]) -> None:
    """Call `train` until a run group has made `step`, as a process that is killed there."""
    real = RunGroup.learn

    def dies(self: RunGroup, batch: Batch, last: bool) -> None:
        real(self, batch, last)
        if self.heads.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunGroup, "learn", dies)
        with pytest.raises(Killed):
            train()
