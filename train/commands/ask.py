"""`train ask`: the answers of a trained head to a question about a video file, or about the clips of a store."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import platformdirs
from jsonargparse.typing import PositiveFloat, PositiveInt

from egopatch.configs.command_line import ConfigParser, parse_options, take_option
from egopatch.configs.experiment_line import overrides_in
from egopatch.configs.schema import ConfigError
from egopatch.features.common.command_line import print_result


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Print the answers with their probabilities and notes on how far to trust them; write a picture."""
    _add_options(parser)
    run, args = take_option(args, "--run")
    video, args = take_option(args, "--video")
    for option in parser.read_first:
        # jsonargparse would read the second one as a YAML file for that section.
        if take_option(args, option)[0] is not None:
            raise ConfigError(f"{option} is given twice; give it once: --video also takes a folder of videos")
    config, options = parse_options(parser, args)
    if not options.question.strip():
        raise ConfigError('QUESTION is empty; expected a question in quotes, such as "what is on the table?"')
    if video is not None and options.clip is not None:
        raise ConfigError(
            "--video and --clip are both given; --clip names a clip of the config's store: give only one of them"
        )
    if video is None and run is None and not options.config:
        raise ConfigError("neither --video nor --config is given; expected a video file, or the config of a store")
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.features import open_store
    from egopatch.train.asking.ask import ask_clips, ask_video
    from egopatch.train.asking.choose import DEMO_FOLDERS, best_run, config_of_run
    from egopatch.train.report.kept_picture import draw_prediction, require_picture_name
    from egopatch.train.rundir.results import table_folder

    if options.picture is not None:
        require_picture_name(options.picture)
    overrides = overrides_in(args)
    given = config if options.config else None
    if video is not None:
        folders = DEMO_FOLDERS if given is None else [table_folder(given)]
        folder = Path(run) if run else best_run(folders, split=given.data.split if given else None)
        cache = options.cache or platformdirs.user_cache_path("egopatch") / "videos"
        experiment = config_of_run(folder, overrides)
        result = ask_video(experiment, Path(video), options.question, options.clip_seconds, cache, options.answers)
    else:
        if run is None:
            assert given is not None
            store = open_store(given.store.path)
            run = str(best_run([table_folder(given)], split=given.data.split, features=store.fingerprint))
        trained = config_of_run(Path(run), overrides)
        experiment = trained if given is None else dataclasses.replace(given, run=trained.run)
        result = ask_clips(experiment, options.clip, options.question, options.answers)
    result = dataclasses.replace(result, predictions=result.predictions[: options.top])
    picture = options.picture or result.default_picture
    if picture is not None:
        draw_prediction(picture, result.predictions[0], result.config)
    lines = [*result.lines(), *([] if picture is None else [f"picture: {picture}"])]
    print_result(options.json, {**result.as_dict(), "picture": picture}, "\n".join(lines))
    return 0


def _add_options(parser: ConfigParser) -> None:
    parser.usage = '"QUESTION" --video FILE [--run DIR] | --config FILE [--clip ID] [options]'
    parser.epilog = "Clips are ranked by the probability of their first answer."
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    parser.add_argument(
        "--clip-seconds", type=PositiveFloat, default=10.0, metavar="SECONDS",
        help="length of the clips that --video is cut into",
    )  # fmt: skip
    parser.add_argument(
        "--clip", type=str | None, default=None, metavar="ID",
        help="id of a clip in the config's store (default: all clips, ranked)",
    )  # fmt: skip
    parser.add_argument("--top", type=PositiveInt, default=3, help="number of clips to show")
    parser.add_argument("--answers", type=PositiveInt, default=5, help="number of answers to show for each clip")
    parser.add_argument(
        "--picture", type=Path | None, default=None, metavar="FILE",
        help="file for a picture of the best clip (.jpg or .png), which shows its frames, their times and the kept"
        " patches in outline (default with --video: beside the features)",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path | None, default=None, metavar="DIR",
        help="folder that keeps the features of videos (default: egopatch/videos in the user's cache folder)",
    )  # fmt: skip
    parser.read_first = {
        "--video": ("FILE", "a video file, or a folder of videos; each is encoded only once"),
        "--run": (
            "DIR",
            "folder of a trained head (default: the one best on val in the table of --config, or of `egopatch demo`)",
        ),
    }
