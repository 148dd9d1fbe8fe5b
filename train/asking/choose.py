"""Chooses the trained head that answers a question if the command line names none."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import Config, ConfigError
from egopatch.features import Fingerprint
from egopatch.train.heads import reads_video
from egopatch.train.report.table import is_standin
from egopatch.train.rundir.card import chooses_options
from egopatch.train.rundir.names import CONFIG, WEIGHTS
from egopatch.train.rundir.results import Run, TableError, gather
from egopatch.train.rundir.run_folder import RunError

# Folders in which `egopatch demo` and `egopatch demo --small` train, relative to the current directory.
DEMO_FOLDERS = (Path("runs/demo"), Path("runs/demo-small"))


def best_run(folders: Sequence[Path], split: str | None = None, features: Fingerprint | None = None) -> Path:
    """The folder of the best trained head below the first of `folders` that has one.

    Heads on an encoder with real weights come before those on random weights; then accuracy on *val* decides.

    Args:
        folders: Folders of runs, as the results table gathers them.
        split: The split that the head was trained on; None for any.
        features: Fingerprint of the store that the head was trained on; None for any.

    Raises:
        RunError: No trained head there reads video and has an answer vocabulary.
    """
    choosers: list[Run] = []
    faults: list[str] = []  # of heads whose package is broken or not installed here
    for folder in folders:
        able: list[Run] = []
        for run in _runs(folder):
            if not _is_trained(run, split, features):
                continue
            try:
                if reads_video(str(run.card.get("model"))):
                    able.append(run)
            except ConfigError as error:
                faults.append(f"{run.dir} ({error})")
        if runs := [run for run in able if not chooses_options(run.card.get("answers") or ())]:
            return max(runs, key=lambda run: (not is_standin(run.card), -math.inf if run.val is None else run.val)).dir
        choosers += able
    names = " or ".join(map(str, folders))
    if choosers:
        raise RunError(
            f"{names} holds only heads that choose among options, such as {choosers[0].dir}; expected one with an "
            "answer vocabulary: train it on questions with answers in place of options (data.questions), or name its "
            "folder with --run"
        )
    about = "" if features is None else " and was trained on the features of this store"
    if faults:
        raise RunError(
            f"{names} holds no trained head that reads video{about} and can be used here; the first of those that "
            f"cannot is {faults[0]}"
        )
    raise RunError(
        f"{names} holds no trained head that reads video{about}; train one with `egopatch train fit --config CONFIG`, "
        "or on EgoSynth with `egopatch demo --small`, or name its folder with --run"
    )


def config_of_run(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a run's folder, with `overrides` from the command line.

    Raises:
        RunError: `run` is not the folder of a run.
    """
    if not (run / CONFIG).is_file():
        raise RunError(f"run folder {run} holds no {CONFIG}; expected the run.dir of a trained head")
    config = load_config(run / CONFIG, overrides)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=run))


def _runs(folder: Path) -> list[Run]:
    try:
        return [run for row in gather(folder).rows for run in row.runs]
    except TableError:
        return []


def _is_trained(run: Run, split: str | None, features: Fingerprint | None) -> bool:
    trained_on = run.card.get("fingerprint")
    return (
        (run.dir / WEIGHTS).is_file()
        and (run.dir / CONFIG).is_file()
        and split in (None, run.split)
        and (features is None or (trained_on is not None and not features.differences(Fingerprint(trained_on), "", "")))
    )
