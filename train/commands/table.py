"""`train table`: gather finished runs into the results table."""

from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.features.common.command_line import print_result
from egopatch.train.report.table import write_table
from egopatch.train.rundir.results import table_folder


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write `table.md` and `table.json` and print the table."""
    config, options = parse_config(parser, args)
    folder = table_folder(config)
    rows = write_table(config, folder)
    table = folder / "table.md"
    print_result(options.json, {"file": table, "rows": rows}, table.read_text(encoding="utf-8"))
    return 0
