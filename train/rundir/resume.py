"""The state that a run group saves so that training can resume, and its file `last.pt`.

It holds the position in the batches, the state of each run, and that of their stacked heads with the optimiser. Random
numbers need no state: they follow from seed and step (`heads.common.noise`).
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from egopatch.features.common.signals import signals_held
from egopatch.features.io.files import replacing
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.rundir.trained_on import DataRecord


@dataclass(frozen=True)
class ResumeState:
    """State of a run group between two batches.

    Attributes:
        position: (epoch, batch) to learn next.
        origin: Identifies the order of batches, the stores and the runs; only a group with an equal one can resume.
        runs: State of each run, as from `TrainingRun.state`.
        heads: State of the stacked heads, as from `StackedHeads.state`: tensors and plain values only.
        data: Record of the answers and questions for learning and scoring, as from `trained_on.record_data`; None in
            files of earlier versions.
    """

    position: tuple[int, int]
    origin: tuple[str, ...]
    runs: tuple[Mapping[str, Any], ...]
    heads: Mapping[str, Any]
    data: DataRecord | None

    def write(self, path: Path) -> None:
        """Replace the file at `path`."""
        # The keys are older than the names of the attributes; existing files keep them.
        state = {
            "place": list(self.position),
            "origin": list(self.origin),
            "members": [dict(run) for run in self.runs],
            "stack": dict(self.heads),
            "data": None if self.data is None else {name: list(record) for name, record in self.data.items()},
        }
        # torch would turn an interrupt within its calls of `file.write` into an error of its own.
        with signals_held(), replacing(path) as new:
            try:
                with new.open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:
                # torch hides a file system error, such as a full disk, behind an error of its own.
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
            data = state.get("data")
            if data is not None:
                data = {kind: (int(count), str(digest)) for kind, (count, digest) in dict(data).items()}
            return cls((epoch, batch), tuple(state["origin"]), tuple(state["members"]), state["stack"], data)
        except (
            RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError
        ) as error:  # fmt: skip
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RunError(f"{path} is damaged ({reason}); delete it to train from the start") from None
