"""`train table`: gather finished runs into the results table."""

from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, add_config_arguments, parse_config
from egopatch.train.report.table import write_table
from egopatch.train.rundir.results import table_folder


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write `table.md` and `table.json` and print the table."""
    add_config_arguments(parser)
    config, _ = parse_config(parser, args)
    folder = table_folder(config)
    write_table(folder, config)
    print((folder / "table.md").read_text(encoding="utf-8"))
    return 0
