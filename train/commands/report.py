"""`train report`: write the HTML report on finished runs."""

from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, add_config_arguments, parse_config
from egopatch.train.rundir.results import table_folder


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write `report.html` and print its path."""
    add_config_arguments(parser)
    config, _ = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before Matplotlib is imported.
    from egopatch.train.report.page import write_report

    print(write_report(config, table_folder(config)))
    return 0
