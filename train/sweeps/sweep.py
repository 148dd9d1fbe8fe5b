"""Many settings of one head on one reading of the features.

Runs may differ in the head and in how it learns, never in the features that it reads. Runs that differ only in ratio
train as stacked heads. A seed sets initialisation, dropout and the order of the batches, as in `fit`, so runs with the
same seed differ in nothing but the setting, and runs with different seeds share nothing.

Several processes, also on machines that share the folder, may run the same sweep: each trains the run groups that no
other holds, then waits for the others' runs, and writes the results of all.
"""

import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml

from egopatch.configs.command_line import ConfigParser, add_config_arguments, option_names, parse_sections
from egopatch.configs.schema import Config, ConfigError
from egopatch.configs.yaml_faults import repeated_key
from egopatch.features import ShardOwned
from egopatch.features.io.files import make_folder
from egopatch.train.fitting.experiment import Experiment, open_experiment
from egopatch.train.fitting.explained import shortage_explained
from egopatch.train.fitting.fit import test_groups, train_together
from egopatch.train.fitting.run import system_name
from egopatch.train.fitting.run_group import RunGroup
from egopatch.train.heads import can_stack, check_head
from egopatch.train.processes.process_pool import call_in_processes, can_fork
from egopatch.train.rundir import card as run_folder
from egopatch.train.rundir.card import RunError
from egopatch.train.rundir.lease import POLL_S, busy, hold, writable
from egopatch.train.rundir.names import GROUPS, SWEEPS
from egopatch.train.rundir.results import table_folder
from egopatch.train.sweeps.sweep_results import write_results

# Options that all runs of a sweep share.
SHARED = (
    "head.name", "head.options", "head.checkpoint", "train.batch", "train.epochs", "train.accumulate",
    "train.residency", "train.device", "train.deterministic",
)  # fmt: skip
# What the names of a registered head's own options start with; the head checks their names and values.
HEAD_OPTIONS = "head.options."
# Options in which stacked heads may differ. Seeds are not among them: stacked heads share the order of the batches, and
# seeds that share it scatter less than seeds that are trained by themselves.
STACKED = ("head.ratio",)
# Largest number of stacked heads. On a GPU more heads gain little speed, and all their activations are held at once. On
# a CPU, twelve stacked heads take a fifth less time than twice six if the store is small; with tokens of the published
# size their activations leave the cache, and they take a sixth more.
STACK_SIZE = {"cuda": 24, "cpu": 12}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Overrides = Mapping[str, Any]


class GroupPlan(NamedTuple):
    """File and configs of a run group that is still to train."""

    path: Path
    configs: list[Config]


def run_sweep(
    config: Config,
    ratios: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    grid: Path | None = None,
    name: str | None = None,
    command: str = "python -m train sweep",
) -> Path:
    """Train every combination that is not finished, and write the results.

    Runs that another process trains are waited for; those that it leaves unfinished are trained here.

    Args:
        config: Config that all runs share.
        ratios: Values of `head.ratio`.
        seeds: Values of `train.seed`.
        grid: YAML file of further options, `section.field: [values]`.
        name: Name of the sweep's folder, below `sweeps` in the table's folder; the default is split and name of
            `run.dir`, so each split has a folder of its own.
        command: Command line, for the model cards.

    Returns:
        `<table>/sweeps/<name>/sweep.json`; beside it `sweep.csv` and `sweep.png`.

    Raises:
        ConfigError: the grid names an option that all runs share, an invalid value, or a value twice; two settings
            would share a folder; or the folder holds runs with other settings or cannot be written.
        RunError: the loss of a run is not finite, and the results of the others are written; or clips were encoded
            again after finished runs had been trained on them.
        Stopped: SIGINT or SIGTERM interrupted training; the same command resumes it.
    """
    name = f"{config.data.split}-{config.run.dir.name}" if name is None else name
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name is {name!r}; expected letters, digits, dots, dashes and underscores")
    out = table_folder(config) / SWEEPS / name
    axes = read_axes(ratios, seeds, grid)
    typed = typed_values(axes)
    runs = [(overrides, run_config(config, overrides, typed, out)) for overrides in combinations(axes)]
    _require_own_folders(runs)
    for _, run in runs:
        check_head(run.head)
        run_folder.require_same_settings(run.run.dir, run)
    configs = [run for _, run in runs]
    before = sum(map(_finished, configs))
    label = f"sweep {name}"
    print(f"{label}: {len(runs)} runs, {before} already finished", flush=True)
    started, bytes_read, trained, failed = time.monotonic(), 0, 0, dict[str, str]()
    if before < len(runs):
        experiment = open_experiment(config)
        print("\n".join(experiment.data_lines), flush=True)
        experiment.print_quarantined()
        for run in filter(_finished, configs):
            experiment.require_trained_on(run.run.dir)
        groups_folder = out / GROUPS
        with writable("run.dir" if config.run.table is None else "run.table", groups_folder):
            make_folder(groups_folder)
        with shortage_explained(config.train, out):
            trained, failed = _train_all(config, configs, experiment, groups_folder, label, command)
        bytes_read = experiment.features.bytes_read
    facts = {
        "name": name,
        "split": config.data.split,
        "model": config.head.name,
        "system": system_name(config),
        "command": command,
        "planned": len(runs),
        "trained": trained,
        "failed": failed,
        "seconds": round(time.monotonic() - started, 3),
        "bytes_read": bytes_read,
    }
    finished = [(overrides, run) for overrides, run in runs if run.run.dir.name not in failed]
    with shortage_explained(config.train, out):
        path = write_results(facts, finished, config, out)
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs have no results in {path}: {'; '.join(failed.values())}")
    return path


def _train_all(
    config: Config, configs: Sequence[Config], experiment: Experiment, groups_folder: Path, label: str, command: str
) -> tuple[int, dict[str, str]]:
    """Train every run that no other process trains to its end; returns as `_train`."""
    trained, told, failed = 0, False, dict[str, str]()
    on_disk = experiment.features.residency == "disk"
    fork = experiment.device.type == "cpu" and can_stack(config.head.name) and not on_disk and can_fork()
    cores = torch.get_num_threads() if fork else 1
    train = partial(_train, experiment=experiment, command=command)
    while unfinished := [run for run in configs if not _finished(run) and run.run.dir.name not in failed]:
        results: list[tuple[int, dict[str, str]]] = []
        possible = [run for run in configs if run.run.dir.name not in failed]
        if plans := plan_groups(possible, groups_folder, experiment.device, cores):
            if fork:
                labels = [f"{label}, run group {number} of {len(plans)}" for number in range(1, len(plans) + 1)]
                calls = [partial(train, [plan], label=name) for plan, name in zip(plans, labels, strict=True)]
                results = call_in_processes(calls, cores)
            else:
                # Resident features are read once anyway; from disk, groups with the same seed share the reading.
                results = [train(_of_one_seed(plans) if on_disk else plans[:1], label=label)]
        elif not told and (holder := next(filter(None, (busy(config.run.dir) for config in unfinished)), None)):
            print(f"{label}: waiting for {len(unfinished)} runs of other processes: {holder}", flush=True)
            told = True
        for count, group_failed in results:
            trained += count
            failed |= group_failed
        if not any(count or group_failed for count, group_failed in results):
            # A run whose process ends before the run is finished is free again.
            time.sleep(POLL_S)
    return trained, failed


def _train(plans: Sequence[GroupPlan], experiment: Experiment, label: str, command: str) -> tuple[int, dict[str, str]]:
    """Train the run groups, all of one seed, that no other process holds, on one reading.

    Returns:
        The number of runs with results, and why the others failed, by the name of their folder.
    """
    order_seed = plans[0].configs[0].train.seed
    with ExitStack() as leases:
        groups: list[RunGroup] = []
        try:
            for plan in plans:
                try:
                    with ExitStack() as group_leases:
                        for config in plan.configs:
                            group_leases.enter_context(hold(config.run.dir))
                        leases.push(group_leases.pop_all())
                except ShardOwned:
                    continue
                if not plan.path.exists() and any(map(_finished, plan.configs)):
                    continue  # another process has just finished some of the runs: plan the others again
                for config in plan.configs:
                    run_folder.claim(config.run.dir, config)
                # A later process reads this file, because only the same runs can resume from the group's position.
                names = [config.run.dir.name for config in plan.configs]
                run_folder.write_whole(plan.path.with_suffix(".json"), json.dumps(names) + "\n")
                groups.append(RunGroup(plan.configs, experiment, order_seed, plan.path))
            if groups:
                train_together(groups, experiment, order_seed, label)
                test_groups(groups, experiment, command)
        finally:
            for group in groups:
                group.close()
        for group in groups:
            group.path.with_suffix(".json").unlink(missing_ok=True)
            group.path.unlink(missing_ok=True)
    runs = [run for group in groups for run in group.runs]
    failed = {run.config.run.dir.name: run.failed for run in runs if run.failed is not None}
    return len(runs) - len(failed), failed


def plan_groups(configs: Sequence[Config], groups_folder: Path, device: torch.device, cores: int) -> list[GroupPlan]:
    """Plans of every run group that is still to train: interrupted groups first.

    Runs of one shape are divided so that each of `cores` has a group, and no group is larger than `STACK_SIZE`.
    """
    by_name = {config.run.dir.name: config for config in configs}
    waiting = {config.run.dir.name for config in configs if not _finished(config) and busy(config.run.dir) is None}
    plans = []
    for path in sorted(groups_folder.glob("*.json")):
        try:
            names = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue  # another process has just finished this group
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
    """The first plan and those with its seed, hence with its order of the batches."""
    return [plan for plan in plans if plan.configs[0].train.seed == plans[0].configs[0].train.seed]


def _shape(config: Config) -> str:
    """Equal for runs that can train as stacked heads."""
    plain = run_folder.plain(config)
    if not can_stack(config.head.name):
        return config.run.dir.name
    return json.dumps(
        [
            (section, option, value)
            for section in ("head", "train")
            for option, value in sorted(plain[section].items())
            if f"{section}.{option}" not in STACKED
        ]
    )


def _finished(config: Config) -> bool:
    return run_folder.is_finished(config.run.dir)


def read_axes(
    ratios: Sequence[float] | None, seeds: Sequence[int] | None, grid: Path | None
) -> dict[str, Sequence[Any]]:
    """Values by option that varies.

    Raises:
        ConfigError: the grid file is missing or malformed, names options that cannot vary, or gives the values of
            `ratios` or `seeds` once more.
    """
    axes: dict[str, Sequence[Any]] = {}
    if grid is not None:
        try:
            text = grid.read_text(encoding="utf-8")
            read = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            fault = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
            raise ConfigError(f"--grid {grid}: {fault}; expected a YAML file") from None
        if repeated := repeated_key(text):
            raise ConfigError(f"--grid {grid}: {repeated}")
        if not isinstance(read, dict) or not all(isinstance(values, list) and values for values in read.values()):
            raise ConfigError(f"--grid {grid}: expected lines such as head.dropout: [0.0, 0.1]")
        axes |= {str(option): values for option, values in read.items()}
    for option, argument, given in (("head.ratio", "--ratios", ratios), ("train.seed", "--seeds", seeds)):
        if given is not None and option in axes:
            raise ConfigError(
                f"{argument} is {list(given)}, but --grid {grid} also has {option}, as {list(axes[option])}; give its "
                "values in one place"
            )
        if given is not None:
            axes[option] = given
    allowed = [o for o in option_names() if o.split(".")[0] in ("head", "train") and o not in SHARED]
    for option in axes:
        if option not in allowed and not option.startswith(HEAD_OPTIONS):
            raise ConfigError(f"{option} cannot vary in a sweep; expected one of {', '.join(allowed)}")
    if not axes:
        raise ConfigError("nothing varies; give --ratios 0.1 0.25 1.0, --seeds 0 1 2 or --grid FILE")
    return axes


def typed_values(axes: Mapping[str, Sequence[Any]]) -> dict[tuple[str, str], Any]:
    """The values in the types of the schema, by option and `_key`.

    Raises:
        ConfigError: a value is invalid, or an option has a value twice, such as `1e-3`, a text in YAML, and `0.001`.
    """
    typed: dict[tuple[str, str], Any] = {}
    for option, values in axes.items():
        listed: list[tuple[Any, Any]] = []
        for value in values:
            parsed = _checked(option, value)
            for other, written in listed:
                # In Python, True equals 1.
                if parsed == other and isinstance(parsed, bool) == isinstance(other, bool):
                    raise ConfigError(
                        f"in the sweep, {option} has a value twice in {list(values)}: {written!r} and {value!r} are "
                        "the same; list each value once"
                    )
            listed.append((parsed, value))
            typed[option, _key(value)] = parsed
    return typed


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last option varying fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def run_config(config: Config, overrides: Overrides, typed: Mapping[tuple[str, str], Any], out: Path) -> Config:
    """`config` with `overrides`, in a folder named after them; `typed` holds the values, parsed."""
    slug = "_".join(f"{option.split('.')[-1]}-{_slug(value)}" for option, value in overrides.items())
    sections: dict[str, Any] = {"run": replace(config.run, dir=out / slug)}
    changes: dict[str, dict[str, Any]] = {}
    for option, value in overrides.items():
        section, field = option.split(".", 1)
        fields = changes.setdefault(section, {})
        if option.startswith(HEAD_OPTIONS):
            own = fields.setdefault("options", dict(config.head.options or {}))
            own[option.removeprefix(HEAD_OPTIONS)] = typed[option, _key(value)]
        else:
            fields[field] = typed[option, _key(value)]
    # All options of a section at once: an option may be valid only together with another.
    sections |= {section: replace(getattr(config, section), **fields) for section, fields in changes.items()}
    return replace(config, **sections)


def _require_own_folders(runs: Sequence[tuple[Overrides, Config]]) -> None:
    """Refuse two runs of one folder, of which only one would be trained: folders have few characters in their names.

    Raises:
        ConfigError: two settings have one folder.
    """
    owners: dict[Path, Overrides] = {}
    for overrides, run in runs:
        first = owners.setdefault(run.run.dir, overrides)
        if first is not overrides:
            different = ", ".join(
                f"{option} {first[option]!r} and {overrides[option]!r}"
                for option in overrides
                if _key(first[option]) != _key(overrides[option])
            )
            raise ConfigError(
                f"in the sweep, two settings would share the folder {run.run.dir} ({different}); leave one of the "
                "values to a sweep with another --name"
            )


def _key(value: Any) -> str:
    """A text for a value as the grid has it, which may be a list."""
    return json.dumps(value, default=str)


def _slug(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]", "_", text)


class _ValueParser(ConfigParser):
    """A parser of one value of a sweep, whose errors are the sweep's."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(f"in the sweep, {self.explain(message)}")


def _checked(option: str, value: Any) -> Any:
    """The value in the type of the schema."""
    section, field = option.split(".", 1)
    parser = _ValueParser(prog="sweep")
    add_config_arguments(parser)
    text = value if isinstance(value, str) else _key(value)
    # What it has to fit in other sections is checked with the config that it becomes a part of.
    sections, _ = parse_sections(parser, [f"--{option}={text}"])
    if option.startswith(HEAD_OPTIONS):
        return (sections["head"].options or {})[option.removeprefix(HEAD_OPTIONS)]
    return getattr(sections[section], field)
