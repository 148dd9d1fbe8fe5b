"""`train explain`: which patches matter to a trained head's answers."""

from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, add_config_arguments, parse_config


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write `explanation.json` into the run's folder and print a line for each ranking."""
    parser.add_argument("--questions", type=int, default=200, help="number of test questions to measure")
    add_config_arguments(parser)
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.train.explanation.explain import explain

    found = explain(config, options.questions)
    path = found.write(config.run.dir)
    print(f"{path}: {found.questions} test questions; mean probability of the head's answer, in percent")
    for one in found.rankings:
        looks = (
            "" if one.pointing is None else f", highest score on an object asked about in {one.pointing:.1f}% of frames"
        )
        print(f"{one.name:<12}  deletion {one.deletion_area:5.1f}  insertion {one.insertion_area:5.1f}{looks}")
    return 0
