"""`train bench`: run one of the benchmark scripts of a checkout."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser
from egopatch.configs.schema import ConfigError
from egopatch.features.common.command_line import print_result

# A wheel has no such folder.
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Run the benchmark that `args` names with the options after its name; returns its exit code."""
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("_"))
    if not names:
        raise ConfigError("benchmarks are not part of the installed package; run this command in a checkout")
    parser.usage = "[--json] NAME [options of the benchmark]"
    parser.epilog = (
        f"NAME is one of {', '.join(names)}; all that follows NAME is passed to the script. With --json, the script's "
        "own output goes to standard error."
    )
    as_json = args[:1] == ["--json"]
    args = args[1:] if as_json else args
    if not args or args[0] in ("-h", "--help"):
        parser.print_help(sys.stdout if args else sys.stderr)
        return 0 if args else 2
    name = args[0]
    if name not in names:
        raise ConfigError(f"unknown benchmark {name!r}; choose one of {', '.join(names)}")
    # A process of its own, because a script may start children that import it.
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *args[1:]]
    if not as_json:
        return _exit_code(subprocess.run(command).returncode)
    printed = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            printed.append(line.rstrip("\n"))
    code = _exit_code(process.returncode)
    print_result(True, {"benchmark": name, "exit_code": code, "printed": printed})
    return code


def _exit_code(code: int) -> int:
    """The exit code of a script; 1 if a signal ended it."""
    return 1 if code < 0 else code
