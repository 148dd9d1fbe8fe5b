"""`extract synth`: render EgoSynth, the synthetic data set."""

import sys
from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser
from egopatch.extract.datasets.egosynth.render import render
from egopatch.features.common.command_line import local_path, messages_apart, print_result
from egopatch.features.common.progress import ProgressDisplay
from egopatch.features.common.units import counted


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Render the set; returns 0."""
    parser.usage = "--out FOLDER [options]"
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="FOLDER",
        help="folder to write, in EgoTaskQA's layout; an EgoSynth set there is replaced",
    )
    parser.add_argument("--clips", type=int, default=1000, help="number of clips, two seconds each")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    parser.add_argument(
        "--hard", action="store_true", help="smaller objects, bystanders and clutter; see docs/egosynth.md"
    )
    options = parser.parse_args(list(args))
    with messages_apart(options.json), ProgressDisplay("render", options.clips, "clips") as display:
        try:
            removed = render(
                options.out,
                clips=options.clips,
                seed=options.seed,
                difficulty="hard" if options.hard else "plain",
                progress=display.update,
            )
        except ValueError as error:
            parser.error(str(error))
    if removed:
        line = f"note: {options.out} held another EgoSynth set, which was replaced; removed"
        print(f"{line} {counted(removed, 'old video')}", file=sys.stderr)
    print_result(options.json, {"out": options.out, "clips": options.clips})
    return 0
