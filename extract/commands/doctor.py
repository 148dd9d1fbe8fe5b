"""`extract doctor`: what this machine has, and with a config, faults in the annotations and videos."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser, parse_options
from egopatch.configs.experiment_line import name_experiment
from egopatch.configs.schema import DataConfig
from egopatch.features.common.command_line import print_result
from egopatch.features.common.disk import nearest_existing
from egopatch.features.common.units import counted


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Print the diagnosis; returns 1 if there are errors or faults."""
    parser.usage = "[--config FILE] [options]"
    config, options = parse_options(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.extract.planning.doctor import examine, format_diagnosis
    from egopatch.extract.planning.machine import check_machine

    has_data = options.config or config.data.root != DataConfig.root
    diagnosis = examine(config) if has_data else None
    store = Path() if "://" in str(config.store.path) else Path(config.store.path)
    checks = check_machine(nearest_existing(store) if has_data else Path.cwd())
    errors = [check.name for check in checks if check.state == "error"]
    found = {} if diagnosis is None else dataclasses.asdict(diagnosis)
    lines = [*map(str, checks), *([] if diagnosis is None else [name_experiment(format_diagnosis(diagnosis), args)])]
    if diagnosis is not None and errors:  # whose lines the diagnosis may have pushed out of sight
        lines.append(f"{counted(len(errors), 'error')} of the machine, see above: {', '.join(errors)}")
    print_result(options.json, {**found, "machine": [dataclasses.asdict(check) for check in checks]}, "\n".join(lines))
    sound = (diagnosis is None or diagnosis.sound) and not errors
    return 0 if sound else 1
