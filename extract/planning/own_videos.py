"""Your own videos without ceremony: a clips file and a config beside a store, from which the usual commands start."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from egopatch.configs.command_line import load_config
from egopatch.configs.schema import Config, ConfigError, DataConfig, RunConfig
from egopatch.extract.datasets import Clip, load_clips
from egopatch.extract.datasets.folder import cut, find_videos, format_clips
from egopatch.extract.datasets.origins import compare_origins
from egopatch.extract.feed.durations import durations_s
from egopatch.extract.feed.pool import decoder_count
from egopatch.extract.fingerprints import configured
from egopatch.features.io.files import replacing
from egopatch.features.state.counts import read_ledger

SHORTEST_CLIP_S = 0.1


@dataclass(frozen=True)
class OwnVideos:
    """What the commands need to encode a folder of videos.

    Attributes:
        config: The experiment, which has no questions.
        config_file: Its YAML file.
        clips_file: The clips, one JSON object per line.
        videos: Number of videos.
        clips: Number of clips.
        new_files: Those of the two files that did not exist before.
    """

    config: Config
    config_file: Path
    clips_file: Path
    videos: int
    clips: int
    new_files: tuple[Path, ...]

    def remove_without_store(self) -> None:
        """Remove the new files if no store exists, so that the next try may have other settings."""
        if not _holds_files(self.config.store.path):
            for file in self.new_files:
                file.unlink(missing_ok=True)


def prepare_own_videos(folder: Path, out: Path, base: Config, clip_s: float | None) -> OwnVideos:
    """Cut the videos of `folder` into clips, and write the clips file and the config beside the store `out`.

    An existing config is not changed, so that it may be edited, for instance to name questions.

    Args:
        folder: Folder with videos, or one video.
        out: Folder of the store.
        base: Experiment from which the config takes frames, encoder, text network, store, head and training.
        clip_s: Length of a clip in seconds; None makes each video one clip.

    Raises:
        DatasetError: As `find_videos`.
        ConfigError: `clip_s` is too small, `out` is a file, the existing config encodes differently from `base`, or the
            store has clips of another length.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(
            f"--out is {str(out)!r}, which is a file; expected a folder for the store: choose another path"
        )
    if clip_s is not None and not clip_s >= SHORTEST_CLIP_S:
        raise ConfigError(f"--clip-seconds is {clip_s:g}; expected at least {SHORTEST_CLIP_S:g}")
    config = config_beside(out, base)
    out = out.absolute()
    config_file, clips_file = out.with_name(f"{out.name}.yaml"), config.data.root / config.data.clips
    if config_file.exists():
        existing = load_config(config_file)
        _require_same(existing, config, config_file)
        config = existing
    videos = find_videos(folder.absolute())
    lengths: list[float | None] = [None] * len(videos)
    if clip_s is not None:
        lengths = durations_s(list(videos.values()), config.video, decoder_count(config, 1))
    clips = [clip for (name, path), end in zip(videos.items(), lengths) for clip in cut(name, path, end, clip_s)]
    _require_same_length(config, clips, clip_s)
    new_files = tuple(file for file in (config_file, clips_file) if not file.exists())
    # The same command may be running elsewhere, so each process writes a temporary file of its own.
    with replacing(clips_file) as new:
        new.write_bytes(format_clips(clips).encode())
    if not config_file.exists():
        with replacing(config_file) as new:
            new.write_bytes(_yaml(config, out).encode())
    return OwnVideos(config, config_file, clips_file, len(videos), len(clips), new_files)


def config_beside(out: Path, base: Config) -> Config:
    """`base` for the clips file beside the store `out`, without questions; its paths are valid from any folder."""
    out = out.absolute()
    return dataclasses.replace(
        base,
        data=DataConfig(name="jsonl", root=out.parent, clips=f"{out.name}.clips.jsonl", questions=None),
        encoder=dataclasses.replace(base.encoder, checkpoint=_anchored(base.encoder.checkpoint)),
        text=dataclasses.replace(base.text, model=str(_anchored(Path(base.text.model)))),
        store=dataclasses.replace(base.store, path=out),
        run=RunConfig(dir=out.with_name(f"{out.name}.runs") / base.head.name),
    )


def _holds_files(store: Path | str) -> bool:
    return Path(store).is_dir() and any(Path(store).iterdir())


def _anchored(path: Path | None) -> Path | None:
    """The absolute path of a file that exists; other names stay."""
    return path.absolute() if path is not None and path.exists() else path


def _require_same(existing: Config, config: Config, file: Path) -> None:
    """Refuse a config file that encodes differently from `config`."""
    pairs: dict[str, tuple[object, object]] = {
        name: (value, configured(config).get(name))
        for name, value in {**dict.fromkeys(configured(config)), **configured(existing)}.items()
    }
    pairs["encoder.checkpoint"] = existing.encoder.checkpoint, config.encoder.checkpoint
    pairs["store.dtype"] = existing.store.dtype, config.store.dtype
    different = [
        f"{name}: file has {held}, requested {value}" for name, (held, value) in pairs.items() if held != value
    ]
    if not different and str(existing.store.path) != str(config.store.path):
        raise ConfigError(
            f"{file} is the config of store {existing.store.path}, but --out is {config.store.path}; if the folder was"
            f" moved, move it back, or replace its old path in {file.name} and run the same command again"
        )
    if different:
        unused = "" if _holds_files(config.store.path) else f", or delete {file.name}: no store exists yet"
        raise ConfigError(
            f"{file} is the config of this store and has different settings ({'; '.join(different)}); use another"
            f" --out, or the original settings{unused}"
        )


def _require_same_length(config: Config, clips: Sequence[Clip], clip_s: float | None) -> None:
    """Refuse to cut videos into another length than those in the store, which would then have clips of both lengths."""
    origins = read_ledger(config.store.path).origins()
    if not origins or not (config.data.root / config.data.clips).exists():
        return
    before = load_clips(config.data)
    length = next((clip.end_s for clip in before if clip.start_s == 0), None)
    cut_now = {clip.video for clip in clips if clip.start_s is not None}
    whole = [clip for clip in before if clip.start_s is None and clip.video in cut_now and clip.clip_id in origins]
    replaced = compare_origins(whole, config.data.root, origins).stale  # which may have been shorter than a clip
    if (length and (clip_s is None or round(clip_s, 6) != length)) or (len(whole) > len(replaced) and not length):
        requested, held = (f"{value:g}" if value else "not given" for value in (clip_s, length))
        raise ConfigError(
            f"--clip-seconds is {requested}, but was {held} for the clips in store {config.store.path}; use another"
            " --out, or the original length"
        )


def _yaml(config: Config, out: Path) -> str:
    """The options that differ from the defaults, one line per section, as in the files of `configs/`."""
    lines = [
        f"# The clips of {out.name}.clips.jsonl, without questions. To train on them, write one JSON object",
        "# per question (question_id, clip_id, question, answer, part), each on a line of its own, to",
        f"# {out.name}.questions.jsonl, and name that file in place of null. Then",
        f"# `extract run --config {shlex.quote(f'{out.name}.yaml')}` encodes the questions, and `train fit` takes the",
        "# same config.",
    ]
    defaults = Config()
    for section in dataclasses.fields(Config):
        value, default = getattr(config, section.name), getattr(defaults, section.name)
        options = {
            option.name: _plain(getattr(value, option.name))
            for option in dataclasses.fields(value)
            if section.name == "data" or getattr(value, option.name) != getattr(default, option.name)
        }
        if options:
            text = yaml.safe_dump(options, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
            lines.append(f"{section.name + ':':<8} {text.rstrip()}")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """A value of a config as YAML can hold it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
