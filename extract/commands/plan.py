"""`extract plan`: the size and duration of a job, or a forecast for a job of any size."""

import dataclasses
from collections.abc import Sequence

from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.configs.experiment_line import name_experiment
from egopatch.features.common.command_line import messages_apart, print_result


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Print the plan; returns 1 if the job would be refused."""
    parser.add_argument(
        "--probe", type=NonNegativeInt, default=4, help="number of clips to decode and encode to estimate the duration"
    )
    parser.add_argument(
        "--clips",
        type=PositiveInt | None,
        default=None,
        help="forecast a job of this many clips, without reading any data",
    )
    parser.add_argument("--gpus", type=PositiveInt, default=1, help="number of GPUs in the forecast")
    parser.add_argument(
        "--cores", type=PositiveInt, default=8, help="number of cores per GPU in the forecast, for decoding"
    )
    parser.add_argument(
        "--clips-per-second",
        type=PositiveFloat | None,
        help="encoding rate of one GPU in the forecast; default: the rate measured by earlier jobs on store.path",
    )
    config, options = parse_config(parser, args)
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.extract.planning.forecast import format_forecast, make_forecast
    from egopatch.extract.planning.plan import format_plan, make_plan

    if options.clips is not None:
        forecast = make_forecast(config, options.clips, options.gpus, options.cores, options.clips_per_second)
        print_result(options.json, dataclasses.asdict(forecast), format_forecast(forecast))
        return 0
    with messages_apart(options.json):  # such as the note of an encoder that cannot be captured
        plan = make_plan(config, options.probe)
    print_result(options.json, dataclasses.asdict(plan), name_experiment(format_plan(plan), args))
    return 1 if plan.refusals else 0
