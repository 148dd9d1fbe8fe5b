"""`train ask`: the answer of a trained head to any question about a stored clip."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from egopatch.configs.command_line import ConfigParser, add_config_arguments, parse_config
from egopatch.configs.schema import Config, ConfigError


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Print the answers with their probabilities, and what they are worth; write a picture if one is requested."""
    parser.add_argument("question", help="the question, in quotes")
    parser.add_argument("--clip", required=True, metavar="ID", help="a clip of the store")
    parser.add_argument("--answers", type=int, default=5, help="number of answers to show")
    parser.add_argument(
        "--picture",
        type=Path | None,
        default=None,
        metavar="FILE",
        help="picture to write (.jpg or .png): the frames, with the kept patches outlined and their times",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config_arguments(parser)
    config, options = parse_config(parser, args)
    if options.answers < 1:
        raise ConfigError(f"--answers is {options.answers}; expected at least 1")
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.train.fitting.predict import predict

    prediction = predict(config, options.clip, options.question, options.answers)
    notes = list(_worth(config, prediction.unknown_words))
    if options.picture is not None:
        from egopatch.train.report.kept_picture import draw_prediction

        draw_prediction(options.picture, prediction, config)
    if options.json:
        picture = None if options.picture is None else str(options.picture)
        print(json.dumps({**dataclasses.asdict(prediction), "notes": notes, "picture": picture}, indent=1))
        return 0
    for answer, probability in prediction.answers:
        print(f"{100 * probability:5.1f}%  {answer}")
    for place, patches in enumerate(prediction.kept):
        when = f"{prediction.times_s[place]:.2f} s" if prediction.times_s else f"frame {prediction.frames[place]}"
        print(f"{when}: kept {len(patches)} of {prediction.grid[0] * prediction.grid[1]} patches")
    if options.picture is not None:
        print(f"picture: {options.picture}")
    for note in notes:
        print(f"note: {note}")
    return 0


def _worth(config: Config, unknown_words: Sequence[str]) -> Iterator[str]:
    """What the answer is worth, where that is little: a line each."""
    from egopatch.train.report.table import is_standin, is_synthetic
    from egopatch.train.rundir.card import Card

    card = dataclasses.asdict(Card.read(config.run.dir))
    if is_standin(card):
        yield "the encoder's weights are random stand-ins, so the answer says nothing about the video"
    if is_synthetic(card):
        yield "the head was trained on EgoSynth's rendered videos, so its answers mean nothing about recorded ones"
    if unknown_words:
        words = ", ".join(map(repr, unknown_words))
        yield f"no stored question has the words {words}, so the head was not trained on them"
