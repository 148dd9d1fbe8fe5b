"""Many settings of one head on one reading of the features.

Runs may differ in the head and in how it learns, never in the features that it reads. Runs that differ only in ratio
train as stacked heads. A seed sets initialisation, dropout and the order of the batches, as in `fit`, so runs with the
same seed differ in nothing but the setting, and runs with different seeds share nothing.

Several processes, also on machines that share the folder, may run the same sweep: each trains the run groups that no
other holds, then waits for the others' runs, and writes the results of all.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from egopatch.configs.schema import Config, ConfigError
from egopatch.features import ShardOwned
from egopatch.features.common.units import counted
from egopatch.features.io.files import make_folder
from egopatch.train.fitting.experiment import Experiment, caller_state_kept, open_experiment
from egopatch.train.fitting.fit import evaluate_groups, train_together
from egopatch.train.fitting.run import system_name
from egopatch.train.fitting.run_group import RunGroup
from egopatch.train.fitting.shortage import shortage_explained
from egopatch.train.heads import can_stack, check_head, reads_ratio
from egopatch.train.processes.process_pool import call_in_processes, can_fork
from egopatch.train.rundir import run_folder
from egopatch.train.rundir.lease import POLL_S, busy, hold, writable
from egopatch.train.rundir.names import GROUPS, SWEEPS
from egopatch.train.rundir.results import table_folder
from egopatch.train.rundir.run_folder import RunError
from egopatch.train.rundir.trained_on import require_same_questions, require_shared_questions
from egopatch.train.sweeps.axes import (
    PlannedRun,
    combinations,
    read_axes,
    require_own_folders,
    run_config,
    typed_values,
)
from egopatch.train.sweeps.sweep_results import write_results

# Options in which stacked heads may differ. Seeds are not among them: stacked heads share the order of the batches, and
# seeds that share it scatter less than seeds that are trained by themselves.
STACKED = ("head.ratio",)
# Largest number of stacked heads. On a GPU more heads gain little speed, and all their activations are held at once. On
# a CPU, twelve stacked heads take a fifth less time than twice six if the store is small; with tokens of the published
# size their activations leave the cache, and they take a sixth more.
STACK_SIZE = {"cuda": 24, "cpu": 12}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# By name of a trained run's folder, the reason why it has no results; None if it has results.
Outcomes = dict[str, str | None]


class GroupPlan(NamedTuple):
    """File and configs of a run group that still has to be trained."""

    path: Path
    configs: list[Config]


def run_sweep(
    config: Config,
    ratios: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    grid: Path | None = None,
    name: str | None = None,
    command: str = "egopatch train sweep",
) -> Path:
    """Train every combination that is not finished, and write the results.

    Waits for runs that another process trains, and trains those that it leaves unfinished.

    Args:
        config: Config that all runs share.
        ratios: Values of `head.ratio`.
        seeds: Values of `train.seed`.
        grid: YAML file of further options, `section.field: [values]`.
        name: Name of the sweep's folder, below `sweeps` in the table's folder; the default is split and name of
            `run.dir`, so each split has its own folder.
        command: Command line, for the model cards.

    Returns:
        `<table>/sweeps/<name>/sweep.json`; beside it `sweep.csv` and `sweep.png`.

    Raises:
        ConfigError: The grid names an option that all runs share, an invalid value, or a value twice; two settings
            would share a folder; or the folder holds runs with other settings or cannot be written.
        RunError: The loss of a run is not finite, and the results of the others are written; or clips were encoded
            again, or answers or questions of *train* or *val* have changed, after finished runs had been trained on
            them.
        Stopped: SIGINT, SIGTERM, SIGUSR1 or SIGHUP interrupted training; the same command resumes it.
    """
    if name is None:
        name = f"{config.data.split}-{config.run.dir.name}"  # of a folder, so it can name another one
    elif not NAME.fullmatch(name):
        raise ConfigError(f"--name is {name!r}; expected letters, digits, dots, dashes and underscores")
    out = table_folder(config) / SWEEPS / name
    axes = read_axes(ratios, seeds, grid)
    runs = _plan_runs(config, axes, out)
    label = f"sweep {name}"
    before = sum(_finished(run.config) for run in runs)
    print(f"{label}: {counted(len(runs), 'run')}, {before} already finished", flush=True)
    if len(axes.get("head.ratio", ())) > 1 and not any(reads_ratio(run.config.head) for run in runs):
        condition = " if head.scores is all" if config.head.name == "psa" else ""
        print(
            f"note: the head {config.head.name} does not depend on head.ratio{condition}, so runs that differ only in "
            "it train the same head; vary other options with --grid",
            flush=True,
        )
    started, bytes_read = time.monotonic(), 0
    outcomes: Outcomes = {}
    if before < len(runs):
        outcomes, bytes_read = _train_unfinished(config, [run.config for run in runs], out, label, command)
    failed = {folder: why for folder, why in outcomes.items() if why is not None}
    facts = {
        "name": name,
        "split": config.data.split,
        "model": config.head.name,
        "system": system_name(config),
        "command": command,
        "planned": len(runs),
        "trained": len(outcomes) - len(failed),
        "failed": failed,
        "seconds": round(time.monotonic() - started, 3),
        "bytes_read": bytes_read,
    }
    path = _write_finished(facts, [run for run in runs if run.folder.name not in failed], config, out)
    if failed:
        total = counted(len(runs), "run")
        have = counted(len(failed), f"of {total} has", f"of {total} have")
        raise RunError(f"{have} no results in {path}: {'; '.join(failed.values())}")
    return path


def _plan_runs(config: Config, axes: Mapping[str, Sequence[Any]], out: Path) -> list[PlannedRun]:
    """The run of each combination. Errors as in `run_sweep`; only reads."""
    pairs = zip(combinations(axes), combinations(typed_values(axes)), strict=True)
    runs = [PlannedRun(overrides, run_config(config, overrides, typed, out)) for overrides, typed in pairs]
    require_own_folders(runs)
    for run in runs:
        check_head(run.config.head)
        run_folder.require_same_settings(run.folder, run.config, "--name")
    return runs


def _train_unfinished(
    config: Config, configs: Sequence[Config], out: Path, label: str, command: str
) -> tuple[Outcomes, int]:
    """Check that the finished runs learned from today's data, and train the others; also returns the bytes read."""
    with shortage_explained(config.train, out, "--name"), caller_state_kept(config.train.device):
        experiment = open_experiment(config)
        print("\n".join(experiment.data_lines), flush=True)
        experiment.print_quarantined()
        for done in filter(_finished, configs):
            experiment.require_trained_on(done.run.dir)
            require_same_questions(done.run.dir, experiment.data_record, config.data.root)
        groups_folder = out / GROUPS
        with writable(_folder_option(config), groups_folder):
            make_folder(groups_folder)
        outcomes = _train_all(config, configs, experiment, groups_folder, label, command)
    return outcomes, experiment.features.bytes_read


def _write_finished(facts: Mapping[str, Any], finished: Sequence[PlannedRun], config: Config, out: Path) -> Path:
    """Write the results; other processes may have trained some of the runs, so all are checked again."""
    for run in finished:
        run_folder.require_same_settings(run.folder, run.config, "--name")
    require_shared_questions([run.folder for run in finished])
    with shortage_explained(config.train, out, "--name"):
        return write_results(facts, finished, config, out)


def _train_all(
    config: Config, configs: Sequence[Config], experiment: Experiment, groups_folder: Path, label: str, command: str
) -> Outcomes:
    """Train every run to its end, except those that other processes finish."""
    outcomes: Outcomes = {}
    announced = False
    on_disk = experiment.features.residency == "disk"
    fork = experiment.device.type == "cpu" and can_stack(config.head.name) and not on_disk and can_fork()
    cores = torch.get_num_threads() if fork else 1
    train = partial(_train, experiment=experiment, command=command)
    while True:
        possible = [run for run in configs if outcomes.get(run.run.dir.name) is None]
        unfinished = [run for run in possible if not _finished(run)]
        if not unfinished:
            return outcomes
        results: list[Outcomes] = []
        if plans := plan_groups(possible, groups_folder, experiment.device, cores):
            if fork:
                labels = [f"{label}, run group {number} of {len(plans)}" for number in range(1, len(plans) + 1)]
                calls = [partial(train, [plan], label=name) for plan, name in zip(plans, labels, strict=True)]
                results = call_in_processes(calls, cores)
            else:
                # Resident features are read once anyway; from disk, groups with the same seed share the reading.
                results = [train(_of_one_seed(plans) if on_disk else plans[:1], label=label)]
        elif not announced and (holder := next(filter(None, (busy(config.run.dir) for config in unfinished)), None)):
            print(
                f"{label}: waiting for {counted(len(unfinished), 'run')} that other processes train: {holder}",
                flush=True,
            )
            announced = True
        for result in results:
            outcomes |= result
        if not any(results):
            # If the process that trains a run ends early, the run becomes free again.
            time.sleep(POLL_S)


def _train(plans: Sequence[GroupPlan], experiment: Experiment, label: str, command: str) -> Outcomes:
    """Train those run groups that no other process holds, on one reading; all must have the same seed."""
    with ExitStack() as leases:
        groups: list[RunGroup] = []
        try:
            for plan in plans:
                group_leases = _hold_all(plan.configs)
                if group_leases is None:
                    continue
                leases.push(group_leases)
                if not plan.path.exists() and any(map(_finished, plan.configs)):
                    continue  # another process has just finished some of the runs: plan the others again
                # A later process reads this file, because only the same runs can resume from the group's position.
                names = [config.run.dir.name for config in plan.configs]
                _remove_unsaved(plan.path.parent, names)
                run_folder.write_whole(plan.path.with_suffix(".json"), json.dumps(names) + "\n")
                groups.append(RunGroup(plan.configs, experiment, plan.path))
            if groups:
                train_together(groups, experiment, label)
                evaluate_groups(groups, experiment, command)
        finally:
            for group in groups:
                group.close()
        for group in groups:
            group.path.with_suffix(".json").unlink(missing_ok=True)
            group.path.unlink(missing_ok=True)
    return {run.config.run.dir.name: run.failed for group in groups for run in group.runs}


def _hold_all(configs: Sequence[Config]) -> ExitStack | None:
    """Hold the leases of all runs; None, holding none, if another process holds one of them."""
    with ExitStack() as leases:
        try:
            for config in configs:
                leases.enter_context(hold(config.run.dir, _folder_option(config)))
        except ShardOwned:
            return None
        return leases.pop_all()


def _remove_unsaved(groups_folder: Path, held: Sequence[str]) -> None:
    """Remove the files of run groups that were killed before they saved a position and have one of the runs in `held`,
    whose leases this process holds: those runs may be in other groups now.
    """
    for path in groups_folder.glob("*.json"):
        if not path.with_suffix(".pt").exists() and not set(held).isdisjoint(_read_names(path)):
            path.unlink(missing_ok=True)


def _read_names(path: Path) -> list[str]:
    """Names of the runs of a group; none if another process has just finished it.

    Raises:
        RunError: The file is damaged.
    """
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); delete it to train its runs from the start") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunError(f"{path} holds no list of runs; delete it to train its runs from the start")
    return names


def plan_groups(configs: Sequence[Config], groups_folder: Path, device: torch.device, cores: int) -> list[GroupPlan]:
    """Plans for all run groups that still have to be trained: interrupted groups first.

    Runs of one shape are divided so that each of `cores` has a group, and no group is larger than `STACK_SIZE`.
    """
    by_name = {config.run.dir.name: config for config in configs}
    waiting = {config.run.dir.name for config in configs if not _finished(config) and busy(config.run.dir) is None}
    plans = []
    for path in sorted(groups_folder.glob("*.json")):
        names = _read_names(path)
        unfinished = {name for name in names if name in by_name and not _finished(by_name[name])}
        known = path.with_suffix(".pt").exists() and set(names) <= by_name.keys()
        if known and unfinished and unfinished <= waiting:
            plans.append(GroupPlan(path.with_suffix(".pt"), [by_name[name] for name in names]))
            waiting -= set(names)
    shapes: dict[str, list[Config]] = {}
    for name, config in by_name.items():
        if name in waiting:
            shapes.setdefault(_shape(config), []).append(config)
    for same_shape in shapes.values():
        size = min(STACK_SIZE[device.type], math.ceil(len(same_shape) / cores))
        for start in range(0, len(same_shape), size):
            group = same_shape[start : start + size]
            digest = hashlib.sha256("\n".join(config.run.dir.name for config in group).encode()).hexdigest()[:16]
            plans.append(GroupPlan(groups_folder / f"{digest}.pt", group))
    return plans


def _of_one_seed(plans: Sequence[GroupPlan]) -> list[GroupPlan]:
    """The first plan, and all plans with the same seed, hence the same order of the batches."""
    return [plan for plan in plans if plan.configs[0].train.seed == plans[0].configs[0].train.seed]


def _shape(config: Config) -> str:
    """A text that is equal for runs that can train as stacked heads."""
    if not can_stack(config.head.name):
        return config.run.dir.name
    plain = run_folder.plain(config)
    return json.dumps(
        [
            (section, option, value)
            for section in ("head", "train")
            for option, value in sorted(plain[section].items())
            if f"{section}.{option}" not in STACKED
        ]
    )


def _folder_option(config: Config) -> str:
    """The option that decides where the sweep's folder is."""
    return "run.dir" if config.run.table is None else "run.table"


def _finished(config: Config) -> bool:
    return run_folder.is_finished(config.run.dir)
