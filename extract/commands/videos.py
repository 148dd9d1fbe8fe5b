"""`extract videos`: encode a folder of videos, without annotations."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from jsonargparse.typing import PositiveFloat

from egopatch.configs.command_line import ConfigParser, parse_config, take_option
from egopatch.configs.packaged import packaged_config
from egopatch.configs.schema import ConfigError
from egopatch.extract.commands.run import as_records, encode
from egopatch.features.common.command_line import messages_apart, print_result
from egopatch.features.common.signals import start_trackers
from egopatch.features.common.units import counted

# `--encoder NAME` -> name of the config that it stands for.
ENCODERS = {"lite": "own_videos_lite", "dinov2": "own_videos_dinov2", "egovlpv2": "own_videos"}


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Write the clips file and the config, and encode; returns an exit code of `extract run`."""
    parser.usage = "FOLDER --out STORE [--encoder NAME] [--clip-seconds SECONDS] [options]"
    parser.epilog = (
        "Beside STORE the command writes STORE.clips.jsonl and STORE.yaml, a config for all other commands. Exit codes"
        " are those of `extract run`."
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder with videos, or one video")
    parser.add_argument("--out", type=str, required=True, metavar="STORE", help="folder of the store to write")
    parser.add_argument(
        "--clip-seconds", type=PositiveFloat | None, default=None, metavar="SECONDS",
        help="length of the clips that each video is cut into; by default each video is one clip",
    )  # fmt: skip
    parser.read_first = {
        "--encoder": (
            "NAME",
            f"one of {', '.join(ENCODERS)}: use the config that ships for this network; default: lite, which "
            "downloads nothing",
        )
    }
    base, options = parse_config(parser, _with_config(args))
    if "://" in options.out:
        raise ConfigError(
            f"--out is {options.out}; expected a folder: to encode into object storage, use `extract run --store.path"
            " URL` with the config that this command writes"
        )
    # Imported here to save start-up time: a wrong option is reported before torch is imported.
    from egopatch.extract.planning.own_videos import prepare_own_videos

    start_trackers()
    with messages_apart(options.json):
        own = prepare_own_videos(options.folder, Path(options.out), base, options.clip_seconds)
        found = f"{counted(own.videos, 'video')}, {counted(own.clips, 'clip')}"
        print(f"{options.folder}: {found}, listed in {own.clips_file}", flush=True)
        try:
            code, results = encode(parser.prog, [own.config], [["--config", str(own.config_file)]])
        finally:
            own.remove_without_store()
        if code == 0:
            print(f"next: egopatch extract status --config {shlex.quote(str(own.config_file))}")
    if results:
        files = {"videos": own.videos, "clips_file": own.clips_file, "config": own.config_file}
        print_result(options.json, {**files, "stores": as_records([own.config], results)})
    return code


def _with_config(args: Sequence[str]) -> list[str]:
    """The command line, with the `--config` that `--encoder` stands for in front unless it has its own."""
    name, args = take_option(args, "--encoder")
    own = any(arg.partition("=")[0] in ("--config", "-h", "--help", "--help-all") for arg in args)
    if name is None and own:
        return args
    if name not in (None, *ENCODERS):
        raise ConfigError(f"--encoder is {name!r}; expected one of {', '.join(ENCODERS)}")
    return ["--config", str(packaged_config(ENCODERS[name or "lite"])), *args]
