"""Errors of one line that say what to do when training runs out of GPU memory or disk space."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from egopatch.configs.schema import TrainConfig
from egopatch.features.common.os_errors import gpu_shortage
from egopatch.features.io.files import write_errors_explained
from egopatch.train.rundir.run_folder import RunError


@contextmanager
def shortage_explained(train: TrainConfig, folder: Path, option: str = "--run.dir") -> Iterator[None]:
    """Turn a GPU's lack of memory into a RunError that names the batch size to try, and a full disk into a StoreError.

    Args:
        folder: Folder of the run or sweep that is written.
        option: Option that chooses another folder, for the message.
    """
    try:
        with write_errors_explained(f"writing to {folder}", kept="the last saved state is intact"):
            yield
    except RuntimeError as error:
        if (shortage := gpu_shortage(error)) is None:
            raise
        smaller = (
            "" if train.batch == 1 else f"--train.batch {train.batch // 2} --train.accumulate {train.accumulate * 2}, "
        )
        raise RunError(
            f"{shortage}, with train.batch {train.batch}; try {smaller}--train.residency ram (features in"
            f" the machine's memory) or a smaller --head.width; a changed setting needs another {option}"
        ) from error
