"""What varies in a sweep: options with their values, and the config of each combination."""

import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from egopatch.configs.command_line import ConfigParser, add_config_arguments, option_names
from egopatch.configs.schema import Config, ConfigError
from egopatch.configs.yaml_faults import read_yaml
from egopatch.features.common.units import counted

# Options that all runs of a sweep share.
SHARED = (
    "head.name", "head.options", "head.checkpoint", "train.batch", "train.epochs", "train.accumulate",
    "train.residency", "train.device", "train.deterministic",
)  # fmt: skip
# Prefix of the names of a registered head's own options; the head checks their names and values.
HEAD_OPTIONS = "head.options."
# Numbers that `read_yaml` leaves as text, as YAML 1.1 does, and a config file does not.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
LONGEST_NAME = 255  # characters of a folder's name, in most file systems

Overrides = Mapping[str, Any]


class PlannedRun(NamedTuple):
    """One combination of a sweep, and its config."""

    overrides: Overrides
    config: Config

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.run.dir


def read_axes(
    ratios: Sequence[float] | None, seeds: Sequence[int] | None, grid: Path | None
) -> dict[str, Sequence[Any]]:
    """Values by option that varies.

    Raises:
        ConfigError: The grid file is missing or malformed, names options that cannot vary, or gives values of
            `ratios` or `seeds` again.
    """
    axes: dict[str, Sequence[Any]] = {}
    if grid is not None:
        try:
            read = read_yaml(grid)
        except ValueError as error:
            raise ConfigError(f"--grid {grid}: {error}") from None
        wrong = ["found no options" if read is None else f"found {read!r:.60}"]
        if isinstance(read, dict):
            lists = ((option, isinstance(values, list) and values) for option, values in read.items())
            wrong = [f"{option} is {read[option]!r:.60}" for option, given in lists if not given]
        if wrong:
            raise ConfigError(f"--grid {grid}: {wrong[0]}; expected lines such as head.dropout: [0.0, 0.1]")
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
            close = difflib.get_close_matches(option, allowed, 1)
            expected = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(allowed)}"
            raise ConfigError(f"{option} cannot vary in a sweep; {expected}")
    if not axes:
        raise ConfigError("nothing varies; give --ratios 0.1 0.25 1.0, --seeds 0 1 2 or --grid FILE")
    return axes


def typed_values(axes: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """`axes` with the values converted to the types of the schema.

    Raises:
        ConfigError: A value has a wrong type, or is listed twice, such as `1e-3`, a text in YAML, and `0.001`.
    """
    typed: dict[str, list[Any]] = {}
    for option, values in axes.items():
        before = typed[option] = []
        for value in values:
            parsed = _checked(option, value)
            for other, written in zip(before, values):
                # In Python, True equals 1.
                if parsed == other and isinstance(parsed, bool) == isinstance(other, bool):
                    raise ConfigError(
                        f"in the sweep, {option} lists a value twice in {list(values)}: {written!r} and {value!r} "
                        "are the same; list each value once"
                    )
            before.append(parsed)
    return typed


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination, the last option varying fastest."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def run_config(config: Config, overrides: Overrides, typed: Overrides, out: Path) -> Config:
    """`config` with the values of `typed`, in a folder named after `overrides`, the same values as they were given.

    Raises:
        ConfigError: A value is out of range, or does not fit the other options.
    """
    slug = "_".join(f"{option.split('.')[-1]}-{_slug(value)}" for option, value in overrides.items())
    sections: dict[str, Any] = {"run": replace(config.run, dir=out / slug)}
    changes: dict[str, dict[str, Any]] = {}
    for option, value in typed.items():
        section, field = option.split(".", 1)
        fields = changes.setdefault(section, {})
        if option.startswith(HEAD_OPTIONS):
            own = fields.setdefault("options", dict(config.head.options or {}))
            own[option.removeprefix(HEAD_OPTIONS)] = value
        else:
            fields[field] = value
    # All options of a section at once: an option may be valid only together with another.
    try:
        sections |= {section: replace(getattr(config, section), **fields) for section, fields in changes.items()}
    except ValueError as error:
        raise ConfigError(f"in the sweep, {error}") from None
    return replace(config, **sections)


def require_own_folders(runs: Sequence[PlannedRun]) -> None:
    """Refuse a folder's name that is too long, and two runs that would share a folder, since only one would be trained:
    folder names allow few characters, and some file systems ignore case.

    Raises:
        ConfigError: A name is too long, or two settings share a folder.
    """
    owners: dict[str, PlannedRun] = {}
    for run in runs:
        if len(run.folder.name) > LONGEST_NAME:
            raise ConfigError(
                f"in the sweep, the folder {run.folder.name:.40}... of {counted(len(run.overrides), 'option')} would "
                f"have a name of {len(run.folder.name)} characters; expected at most {LONGEST_NAME}: vary fewer "
                "options in --grid, and set those with one value in the config"
            )
        first = owners.setdefault(run.folder.name.lower(), run)
        if first is not run:
            different = ", ".join(
                f"{option} {first.overrides[option]!r} and {value!r}"
                for option, value in run.overrides.items()
                if _key(first.overrides[option]) != _key(value)
            )
            raise ConfigError(
                f"in the sweep, two settings would share the folder {run.folder} ({different}); move one of the "
                "values to a sweep with another --name"
            )


def _key(value: Any) -> str:
    """A text that identifies a value of the grid, which may be a list."""
    return json.dumps(value, default=str)


def _slug(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]", "_", text)


class _ValueParser(ConfigParser):
    """A parser for one value of a sweep, which reports errors as the sweep's."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(f"in the sweep, {self.explain(message)}")


def _checked(option: str, value: Any) -> Any:
    """The value, converted to the type of the schema; texts of a registered head's options stay as they are."""
    if option.startswith(HEAD_OPTIONS):
        return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
    parser = _ValueParser(prog="sweep")
    add_config_arguments(parser)
    text = value if isinstance(value, str) else _key(value)
    # Whether it fits other options, such as `head.heads` and the width, is checked with the complete config.
    return parser.parse_args([f"--{option}={text}"])[option]
