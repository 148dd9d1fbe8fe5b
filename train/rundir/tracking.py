"""Sends a run's numbers to an experiment tracker, beside its own log: Weights & Biases or MLflow; off by default.

The tracker's own environment variables say where and as whom it logs (`WANDB_PROJECT`, `MLFLOW_TRACKING_URI`, ...).
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from egopatch.configs.schema import ConfigError
from egopatch.train.rundir.checked_json import read_object
from egopatch.train.rundir.names import TRACKING
from egopatch.train.rundir.run_folder import RunError, write_whole

# Name of the project or experiment, unless the tracker's environment variable names another.
EXPERIMENT = "egopatch"
# Values that MLflow gets in one request.
PENDING = 200


def open_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> "Tracker | None":
    """Open the run of `folder` in the tracker `name`, or create it; if that fails, print a line and return None.

    Args:
        name: `wandb` or `mlflow`.
        config: Values of the resolved config.

    Raises:
        ConfigError: The tracker's package is not installed.
        RunError: `tracking.json` is damaged.
    """
    try:
        module = import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(
            f"run.tracker is {name!r}, whose package is not installed; run: pip install 'egopatch[{name}]'"
        ) from None
    record = folder / TRACKING
    try:
        known = read_object(record) if record.exists() else {}
    except ValueError as error:
        raise RunError(f"{record} is damaged ({error}); delete it to log to a new run of the tracker") from None
    try:
        tracker = TRACKERS[name](module, folder, _flat(config), known.get(name))
    except Exception as error:  # each tracker raises its own kinds
        report_failure(error)
        return None
    # With the id, a run that resumes here resumes there.
    write_whole(record, json.dumps(known | {name: tracker.id}) + "\n")
    return tracker


def report_failure(error: Exception) -> None:
    """Print that the run continues without its tracker, as when its server is gone; the run's own log is complete."""
    reason = " ".join(str(error).split())
    print(f"run.tracker failed, and the run continues without it: {reason:.300}", file=sys.stderr)


class WandbRun:
    """A run of Weights & Biases. Several may be open at once, as in a sweep."""

    def __init__(self, wandb: ModuleType, folder: Path, config: Mapping[str, Any], id: str | None) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", EXPERIMENT),
            name=str(folder),
            dir=str(folder),
            config=dict(config),
            id=id,
            resume="allow",
            reinit="create_new",
        )
        self.id = str(self._run.id)
        # With an axis of its own, a run that resumes may repeat steps.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values of one step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Send what is pending, and end the run."""
        self._run.finish()


class MlflowRun:
    """A run of MLflow, through its client: the module's own functions handle only one run at a time."""

    def __init__(self, mlflow: ModuleType, folder: Path, config: Mapping[str, Any], id: str | None) -> None:
        self._metric, self._client = mlflow.entities.Metric, mlflow.MlflowClient()
        self._pending: list[Any] = []
        if id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            id = self._client.create_run(experiment, run_name=str(folder)).info.run_id
            for option, value in config.items():
                self._client.log_param(id, option, value)
        else:
            self._client.update_run(id, status="RUNNING")
        self.id = str(id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Collect the values of one step, and send those of several steps together: each call is a request."""
        now = int(time.time() * 1000)
        self._pending += [self._metric(name, value, now, step) for name, value in values.items()]
        if len(self._pending) >= PENDING:
            self._send()

    def close(self) -> None:
        """Send what is pending, and mark the run as finished."""
        self._send()
        self._client.set_terminated(self.id)

    def _send(self) -> None:
        self._client.log_batch(self.id, metrics=self._pending)
        self._pending = []


Tracker = WandbRun | MlflowRun
TRACKERS: Mapping[str, type[Tracker]] = {"wandb": WandbRun, "mlflow": MlflowRun}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, options in config.items() for name, value in options.items()}
