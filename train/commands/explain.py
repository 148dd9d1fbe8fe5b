"""`train explain`: which patches matter to a trained head's answers."""

import json
from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.features.common.command_line import messages_apart, print_result


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write `explanation.json` into the run's folder and print a line for each ranking."""
    parser.add_argument("--questions", type=int, default=200, help="number of test questions to measure (default: 200)")
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.train.explanation.explain import explain

    with messages_apart(options.json):
        found = explain(config, options.questions)
    path = found.write(config.run.dir)
    lines = [f"{path}: {found.questions} test questions; mean probability of the head's answer, in percent"]
    for ranking in found.rankings:
        areas = f"deletion {ranking.deletion_area:5.1f}  insertion {ranking.insertion_area:5.1f}"
        pointing = ""
        if ranking.pointing is not None:
            pointing = f", highest score on an object asked about in {ranking.pointing:.1f}% of frames"
        lines.append(f"{ranking.name:<12}  {areas}{pointing}")
    print_result(options.json, {"file": path, **json.loads(path.read_text(encoding="utf-8"))}, "\n".join(lines))
    return 0
