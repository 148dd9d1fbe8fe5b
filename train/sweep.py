"""Many settings of one head on one reading of the features.

Members share every batch, so they may differ in what the head is and how it learns, never in what it reads. All see
the batches in the order of the config's own seed; their seeds set initialisation and dropout.
"""

import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from configs.schema import Config, ConfigError, ConfigParser, add_config_arguments, option_names, parse_config
from train import card as folder
from train.experiment import open_experiment
from train.member import Member, test_members
from train.run import train_together

# What members may differ in.
SHARED = ("head.name", "train.batch", "train.epochs", "train.residency", "train.device")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def run_sweep(
    config: Config,
    ratios: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    grid: Path | None = None,
    name: str | None = None,
    command: str = "python -m train sweep",
) -> Path:
    """Train every combination that is not finished yet and write `sweep.json`.

    Args:
        config: what all members share.
        ratios: values of `head.ratio`.
        seeds: values of `train.seed`.
        grid: YAML file of further options, `section.field: [values]`.
        name: of the folder below `sweeps` of the table's folder; the default is split and name of `run.dir`, so that
            splits stay apart.
        command: that was given, for the model cards.

    Returns:
        `<table>/sweeps/<name>/sweep.json`.

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
    members = [(overrides, member_config(config, overrides, out)) for overrides in combinations(axes)]
    for _, member in members:
        folder.claim(member.run.dir, member)
    waiting = [member for _, member in members if not (member.run.dir / folder.TEST).exists()]
    label = f"sweep {name}"
    print(f"{label}: {len(members)} members, {len(members) - len(waiting)} finished before", flush=True)
    started, nbytes = time.monotonic(), 0
    if waiting:
        experiment = open_experiment(config)
        print(experiment.features.said, flush=True)
        runs = [Member(member, experiment, order=config.train.seed) for member in waiting]
        try:
            train_together(runs, experiment, config.train.seed, label)
        finally:
            for run in runs:
                run.log.close()
        for run in runs:
            run.restore_best(command)
        test_members([(run.config, run.trainer) for run in runs], experiment)
        nbytes = experiment.features.nbytes
    result = {
        "name": name,
        "split": config.data.split,
        "model": config.head.name,
        "command": command,
        "trained": len(waiting),
        "seconds": round(time.monotonic() - started, 3),
        "bytes_read": nbytes,
        "members": [_record(overrides, member, out) for overrides, member in members],
    }
    folder.write_whole(out / "sweep.json", json.dumps(result, indent=2) + "\n")
    for line in describe(result):
        print(line, flush=True)
    return out / "sweep.json"


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


def member_config(config: Config, overrides: Mapping[str, Any], out: Path) -> Config:
    """`config` with `overrides`, checked as the command line would be, in a folder named after them."""
    slug = "_".join(f"{option.split('.')[1]}-{_slug(value)}" for option, value in overrides.items())
    sections: dict[str, Any] = {"run": replace(config.run, dir=out / slug)}
    for option, value in overrides.items():
        section, field = option.split(".")
        current = sections.get(section, getattr(config, section))
        sections[section] = replace(current, **{field: _checked(option, value)})
    return replace(config, **sections)


def describe(result: Mapping[str, Any]) -> list[str]:
    """A line a member."""
    return [
        f"  {', '.join(f'{option} {value}' for option, value in m['overrides'].items())}: "
        f"open {_percent(m['open'])}, binary {_percent(m['binary'])}, all {_percent(m['all'])} (n {m['n']})"
        for m in result["members"]
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _slug(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]", "_", text)


def _checked(option: str, value: Any) -> Any:
    """The value as the schema types it."""
    section, field = option.split(".")
    parser = ConfigParser(prog="sweep", exit_on_error=False)
    add_config_arguments(parser)
    try:
        config, _ = parse_config(parser, [f"--{option}={json.dumps(value)}"])
    except SystemExit:
        raise ConfigError(f"{option} is {value!r} in the sweep; see the line above") from None
    return getattr(getattr(config, section), field)


def _record(overrides: Mapping[str, Any], member: Config, out: Path) -> dict[str, Any]:
    test = json.loads((member.run.dir / folder.TEST).read_text(encoding="utf-8"))
    return {
        "ratio": member.head.ratio,
        "seed": member.train.seed,
        "overrides": dict(overrides),
        **{part: test[part]["accuracy"] for part in ("open", "binary", "all")},
        "n": test["all"]["n"],
        "dir": member.run.dir.relative_to(out).as_posix(),
    }
