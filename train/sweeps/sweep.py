"""Many settings of one head on one reading of the features.

Members may differ in what the head is and how it learns, never in what it reads. Those that differ in the ratio and
the seed alone train as one stack. All see the batches in the order of the config's own seed; their seeds set
initialisation and dropout, so that members with one seed differ in nothing but the setting.

A sweep may be started on several machines that share the folder: a process takes the crews that nobody has.
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
from typing import Any

import torch
import yaml

from egopatch.configs.schema import Config, ConfigError, ConfigParser, add_config_arguments, option_names, parse_config
from egopatch.features import ShardOwned
from egopatch.features.io import file_lease as lease
from egopatch.train.fitting.experiment import Experiment, open_experiment
from egopatch.train.fitting.fit import test_crews, train_together
from egopatch.train.fitting.run_group import Crew
from egopatch.train.processes.process_pool import call_in_processes, can_fork
from egopatch.train.rundir import card as folder
from egopatch.train.sweeps.sweep_results import write_results

# What members must share.
SHARED = (
    "head.name", "head.checkpoint", "train.batch", "train.epochs", "train.accumulate", "train.residency",
    "train.device", "train.deterministic",
)  # fmt: skip
# What members of a stack may differ in.
STACKED = ("head.ratio", "train.seed")
# The heads of the published networks fill a machine by themselves; the majority learns nothing.
ALONE = ("majority", "egovlpv2", "mfas")
# Members of a stack. On a GPU more gain little speed, and their activations are held at once. On a CPU one stack of
# twelve takes a fifth less time than two of six where the store is small; on tokens of the published size its
# activations leave the cache, and it takes a sixth more.
STACK = {"cuda": 24, "cpu": 12}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Overrides = Mapping[str, Any]


def run_sweep(
    config: Config,
    ratios: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    grid: Path | None = None,
    name: str | None = None,
    command: str = "python -m train sweep",
) -> Path:
    """Train every combination that is neither finished nor in another process's hands, and write the results.

    Args:
        config: what all members share.
        ratios: values of `head.ratio`.
        seeds: values of `train.seed`.
        grid: YAML file of further options, `section.field: [values]`.
        name: of the folder below `sweeps` of the table's folder; the default is split and name of `run.dir`, so that
            splits stay apart.
        command: that was given, for the model cards.

    Returns:
        `<table>/sweeps/<name>/sweep.json`; beside it `sweep.csv` and `sweep.png`. It holds the members that are
        finished; the last process to end writes the whole.

    Raises:
        ConfigError: the grid names an option that members must share, or a value that is not valid.
        Stopped: by SIGINT or SIGTERM; the same command goes on.
    """
    name = f"{config.data.split}-{config.run.dir.name}" if name is None else name
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name is {name!r}; expected letters, digits, dots, dashes and underscores")
    table = config.run.dir.parent if config.run.table is None else config.run.table
    out = table / "sweeps" / name
    axes = read_axes(ratios, seeds, grid)
    typed = {(option, json.dumps(value)): _checked(option, value) for option in axes for value in axes[option]}
    members = [(overrides, member_config(config, overrides, typed, out)) for overrides in combinations(axes)]
    for _, member in members:
        folder.claim(member.run.dir, member)
    configs = [member for _, member in members]
    before = sum(map(_finished, configs))
    label = f"sweep {name}"
    print(f"{label}: {len(members)} members, {before} finished before", flush=True)
    started, nbytes, trained = time.monotonic(), 0, 0
    if before < len(members):
        experiment = open_experiment(config)
        print(experiment.features.residency_line, flush=True)
        trained = _train_free(config, configs, experiment, out / "crews", label, command)
        nbytes = experiment.features.bytes_read
    done = [(overrides, member) for overrides, member in members if _finished(member)]
    if len(done) < len(members):
        print(f"{label}: {len(members) - len(done)} members are left to their owners", flush=True)
    facts = {
        "name": name,
        "split": config.data.split,
        "model": config.head.name,
        "command": command,
        "planned": len(members),
        "trained": trained,
        "seconds": round(time.monotonic() - started, 3),
        "bytes_read": nbytes,
    }
    return write_results(facts, done, config, out)


def _train_free(
    config: Config, configs: Sequence[Config], experiment: Experiment, place: Path, label: str, command: str
) -> int:
    """Train what nobody else does, crew by crew; returns how many members this process has trained."""
    place.mkdir(exist_ok=True)
    trained, skipped = 0, set[Path]()
    on_disk = experiment.features.residency == "disk"
    fork = experiment.device.type == "cpu" and config.head.name not in ALONE and not on_disk and can_fork()
    cores = torch.get_num_threads() if fork else 1
    train = partial(_train, experiment=experiment, order=config.train.seed, command=command)
    while free := [crew for crew in plan_crews(configs, place, experiment.device, cores) if crew[0] not in skipped]:
        if fork:
            labels = [f"{label}, crew {number} of {len(free)}" for number in range(1, len(free) + 1)]
            calls = [partial(train, [crew], label=own) for crew, own in zip(free, labels, strict=True)]
            done = call_in_processes(calls, cores)
        else:
            # What memory holds is read once anyway; from disk, crews that train together share the reading.
            done = [train(free if on_disk else free[:1], label=label)]
        for members, owned in done:
            trained += members
            skipped |= owned
    return trained


def _train(
    crews: Sequence[tuple[Path, list[Config]]], experiment: Experiment, order: int, label: str, command: str
) -> tuple[int, set[Path]]:
    """Train crews on one reading; returns how many members it has trained, and which crews another process has."""
    owned = set[Path]()
    with ExitStack() as leases:
        taken: list[Crew] = []
        try:
            for path, members in crews:
                try:
                    with ExitStack() as own:
                        for member in members:
                            own.enter_context(lease.hold(member.run.dir, 0))
                        leases.push(own.pop_all())
                except ShardOwned:
                    owned.add(path)
                    continue
                if not path.exists() and any(map(_finished, members)):
                    continue  # by a process that has let go of them just now: they are planned anew
                # Read by a later process, which has to form the same crew to go on from its place.
                names = [member.run.dir.name for member in members]
                folder.write_whole(path.with_suffix(".json"), json.dumps(names) + "\n")
                taken.append(Crew(members, experiment, order, path))
            if taken:
                train_together(taken, experiment, order, label)
                test_crews(taken, experiment, command)
        finally:
            for crew in taken:
                crew.close()
        for crew in taken:
            crew.path.with_suffix(".json").unlink()
            crew.path.unlink()
    return sum(len(crew.members) for crew in taken), owned


def plan_crews(
    configs: Sequence[Config], place: Path, device: torch.device, cores: int
) -> list[tuple[Path, list[Config]]]:
    """The file and the members of every crew that is still to train: first those that were interrupted.

    Members of one shape are dealt to crews so that each of `cores` has one, and none is larger than `STACK`.
    """
    by_name = {config.run.dir.name: config for config in configs}
    waiting = {config.run.dir.name for config in configs if not _finished(config) and not _owned(config)}
    crews = []
    for path in sorted(place.glob("*.json")):
        names = json.loads(path.read_text(encoding="utf-8"))
        left = {name for name in names if name in by_name and not _finished(by_name[name])}
        if path.with_suffix(".pt").exists() and set(names) <= by_name.keys() and left and left <= waiting:
            crews.append((path.with_suffix(".pt"), [by_name[name] for name in names]))
            waiting -= set(names)
    shapes: dict[str, list[Config]] = {}
    for name, config in by_name.items():
        if name in waiting:
            shapes.setdefault(_shape(config), []).append(config)
    for members in shapes.values():
        size = min(STACK[device.type], math.ceil(len(members) / cores))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            digest = hashlib.sha256("\n".join(member.run.dir.name for member in part).encode()).hexdigest()[:16]
            crews.append((place / f"{digest}.pt", part))
    return crews


def _shape(config: Config) -> str:
    """Equal for members that can train as one stack."""
    plain = folder.plain(config)
    if config.head.name in ALONE:
        return config.run.dir.name
    return json.dumps(
        [
            (section, option, value)
            for section in ("head", "train")
            for option, value in sorted(plain[section].items())
            if f"{section}.{option}" not in STACKED
        ]
    )


def _owned(config: Config) -> bool:
    return lease.holder(lease.lease_path(config.run.dir, 0)) is not None


def _finished(config: Config) -> bool:
    return (config.run.dir / folder.TEST).exists()


def read_axes(
    ratios: Sequence[float] | None, seeds: Sequence[int] | None, grid: Path | None
) -> dict[str, Sequence[Any]]:
    """The options to vary and their values.

    Raises:
        ConfigError: the grid file is missing or not of that shape, or names options that cannot vary.
    """
    axes: dict[str, Sequence[Any]] = {}
    if grid is not None:
        try:
            read = yaml.safe_load(grid.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--grid {grid}: {' '.join(str(error).split())}; expected a YAML file") from None
        if not isinstance(read, dict) or not all(isinstance(values, list) and values for values in read.values()):
            raise ConfigError(f"--grid {grid}: expected lines such as head.dropout: [0.0, 0.1]")
        axes |= {str(option): values for option, values in read.items()}
    axes |= {option: v for option, v in (("head.ratio", ratios), ("train.seed", seeds)) if v is not None}
    allowed = [o for o in option_names() if o.split(".")[0] in ("head", "train") and o not in SHARED]
    for option, values in axes.items():
        if option not in allowed:
            raise ConfigError(f"{option} cannot vary in a sweep; expected one of {', '.join(allowed)}")
        if len({json.dumps(value) for value in values}) < len(values):
            raise ConfigError(f"{option} has a value twice in {list(values)}; expected each once")
    if not axes:
        raise ConfigError("nothing varies; give --ratios 0.1 0.25 1.0, --seeds 0 1 2 or --grid FILE")
    return axes


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last option varying fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def member_config(config: Config, overrides: Overrides, typed: Mapping[tuple[str, str], Any], out: Path) -> Config:
    """`config` with `overrides` in a folder named after them; `typed` has their values as the schema types them."""
    slug = "_".join(f"{option.split('.')[1]}-{_slug(value)}" for option, value in overrides.items())
    sections: dict[str, Any] = {"run": replace(config.run, dir=out / slug)}
    changes: dict[str, dict[str, Any]] = {}
    for option, value in overrides.items():
        section, field = option.split(".")
        changes.setdefault(section, {})[field] = typed[option, json.dumps(value)]
    # All options of a section at once: one may be valid only beside another.
    sections |= {section: replace(getattr(config, section), **fields) for section, fields in changes.items()}
    return replace(config, **sections)


def _slug(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]", "_", text)


def _checked(option: str, value: Any) -> Any:
    """The value as the schema types it."""
    section, field = option.split(".")
    parser = ConfigParser(prog="sweep", exit_on_error=False)
    add_config_arguments(parser)
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        config, _ = parse_config(parser, [f"--{option}={text}"])
    except SystemExit:
        raise ConfigError(f"{option} is {value!r} in the sweep; see the line above") from None
    return getattr(getattr(config, section), field)
