"""`train report`: write the HTML report on finished runs."""

from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.features.common.command_line import print_result
from egopatch.train.rundir.results import table_folder


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write `report.html` and print its path."""
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before Matplotlib is imported.
    from egopatch.train.report.page import write_report

    path = write_report(config, table_folder(config))
    print_result(options.json, {"file": path}, str(path))
    return 0
