"""`extract checkpoint`: identify a checkpoint file, or convert it to safetensors."""

from collections.abc import Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser
from egopatch.features.common.command_line import local_path, print_result


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Print what the file holds; returns 1 if tensors are missing."""
    parser.usage = "{inspect,convert} FILE [options]"
    parser.add_argument("action", choices=["inspect", "convert"], help="identify the file, or write it as safetensors")
    parser.add_argument("file", type=Path, help="checkpoint file, in any format that `encoder.checkpoint` takes")
    parser.add_argument("--out", type=local_path, default=None, help="safetensors file that convert writes")
    options = parser.parse_args(list(args))
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.extract.encoders.inspection import convert_checkpoint, inspect_checkpoint

    if options.action == "inspect":
        found = inspect_checkpoint(options.file)
    else:
        found = convert_checkpoint(options.file, options.out or options.file.with_suffix(".safetensors"))
    print_result(options.json, found.as_dict(), "\n".join(found.lines()))
    return 0 if found.complete else 1
