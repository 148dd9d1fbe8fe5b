"""What a run group saves so that training can resume, and its file `last.pt`.

It holds the position in the batches, the state of each run, and that of their stacked heads with the optimiser. Random
numbers need no state: they follow from seed and step (`heads.common.noise`).
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from egopatch.features.io.files import replacing
from egopatch.train.rundir.card import RunError

LAST = "last.pt"


@dataclass(frozen=True)
class ResumeState:
    """State of a run group between two batches.

    Attributes:
        position: (epoch, batch) to learn next.
        origin: Names of the order of batches, the stores and the runs; another group does not resume from this state.
        runs: State of each run, as from `TrainingRun.state`.
        heads: State of the stacked heads, as from `StackedHeads.state`: tensors and plain values only.
    """

    position: tuple[int, int]
    origin: tuple[str, ...]
    runs: tuple[Mapping[str, Any], ...]
    heads: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Replace the file at `path`."""
        # The keys are older than the names of the attributes; existing files keep them.
        state = {
            "place": list(self.position),
            "origin": list(self.origin),
            "members": [dict(run) for run in self.runs],
            "stack": dict(self.heads),
        }
        with replacing(path) as new:
            try:
                with new.open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:
                # torch raises an error of its own after that of the file system, such as a full disk.
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise cause or error from None

    @classmethod
    def read(cls, path: Path) -> "ResumeState | None":
        """The state in the file at `path`; None if it does not exist.

        Raises:
            RunError: The file is damaged.
        """
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            epoch, batch = state["place"]
            return cls((epoch, batch), tuple(state["origin"]), tuple(state["members"]), state["stack"])
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RunError(f"{path} is damaged ({reason}); delete it to train from the start") from None
