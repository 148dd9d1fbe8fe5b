"""`train bench`: run one of the benchmark scripts of a checkout."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser
from egopatch.configs.schema import ConfigError

# A wheel has no such folder.
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Run the benchmark that the first of `args` names with the other `args`; returns its exit code."""
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("_"))
    if not names:
        raise ConfigError("benchmarks are not part of the installed package; run this command in a checkout")
    parser.usage = "train bench NAME [options of the benchmark]"
    parser.epilog = f"NAME is one of {', '.join(names)}"
    if not args or args[0] in ("-h", "--help"):
        parser.print_help(sys.stdout if args else sys.stderr)
        return 0 if args else 2
    name = args[0]
    if name not in names:
        raise ConfigError(f"unknown benchmark {name!r}; choose one of {', '.join(names)}")
    spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return int(module.main(list(args[1:])) or 0)
