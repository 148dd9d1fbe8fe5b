"""A picture of one answer: the clip's frames, with the patches that the head kept outlined and the others dimmed."""

import dataclasses
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets import load_clips
from egopatch.extract.encoders import input_transform
from egopatch.features.common.pictures import DIMMED, sheet
from egopatch.features.values.errors import require_type
from egopatch.train.fitting.predict import Prediction
from egopatch.train.report.examples import prepare_picture
from egopatch.train.rundir.run_folder import write_whole

FORMATS = (".jpg", ".jpeg", ".png")
OUTLINE = 2  # pixels
YELLOW = (255, 214, 0)


def draw_prediction(path: Path, prediction: Prediction, config: Config) -> None:
    """Decode the clip's video and write the picture.

    Args:
        config: Config of the store; its data set says where the clip's video is.

    Raises:
        ConfigError: `path` is not the name of a picture, or the clip's video cannot be shown.
        DatasetError: The annotations cannot be read.
    """
    require_picture_name(path)
    frames = clip_frames(config, prediction.clip_id)[list(prediction.frames)]
    cells = []
    for index, frame in enumerate(frames):
        shown = mark_kept(frame, prediction.kept[index], prediction.grid) if prediction.kept else frame
        cells.append((shown, prediction.when(index)))
    picture = io.BytesIO()  # Pillow does not notice a full disk when it writes a JPEG file itself
    sheet(cells).save(picture, "PNG" if path.suffix.lower() == ".png" else "JPEG")
    write_whole(path, picture.getvalue())


def clip_frames(config: Config, clip_id: str) -> NDArray[np.float32]:
    """The frames of a clip as the encoder saw them: pictures [T, 3, S, S] in [0, 1] with the encoder's crop.

    Args:
        config: Config of the store, whose data set says where the clip's video is.

    Raises:
        TypeError: `config` is no experiment, such as the path of its file, or `clip_id` is not one id.
        ConfigError: The data set has no such clip, or its video cannot be shown.
        DatasetError: The annotations cannot be read.
    """
    require_type("config", config, Config, "an experiment: load_config(path)")
    require_type("clip_id", clip_id, str, "the id of one clip; store.clip_ids lists them")
    # Imported here, because decoding takes long to load and only pictures need it.
    from egopatch.extract.feed.pool import DecodePool, UndecodedClip

    clip = next((clip for clip in load_clips(config.data) if clip.clip_id == clip_id), None)
    if clip is None:
        raise ConfigError(f"the picture needs the video of clip {clip_id!r}, but data.root has no such clip")
    transform = input_transform(config.encoder.arch, config.encoder.checkpoint, config.video.size)
    video = dataclasses.replace(config.video, decoder="pyav")
    with DecodePool(video, workers=1, prepare=partial(prepare_picture, transform=transform)) as pool:
        (shown,) = pool.map([clip])
    if isinstance(shown, UndecodedClip):
        raise ConfigError(f"the video of clip {clip.clip_id!r} cannot be shown ({shown.reason})")
    return np.asarray(shown.frames)


def require_picture_name(path: Path) -> None:
    """Check that `path` is the name of a picture.

    Raises:
        ConfigError: It is not.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--picture is {path}; expected a name that ends in {', '.join(FORMATS)}")


def mark_kept(frame: NDArray[np.float32], kept: Sequence[int], grid: tuple[int, int]) -> NDArray[np.float32]:
    """A frame [3, S, S] in [0, 1] with the kept patches outlined and the others dimmed.

    Args:
        kept: Row-major indices of the kept patches.
        grid: (rows, cols) of the patches.
    """
    side = frame.shape[-1]
    rows, cols = (np.arange(side) * count // side for count in grid)
    patches = np.zeros(grid[0] * grid[1], dtype=bool)
    patches[list(kept)] = True
    mask = patches.reshape(grid)[rows[:, None], cols]
    around = np.pad(mask, OUTLINE)
    steps = range(2 * OUTLINE + 1)
    inner = np.logical_and.reduce([around[r : r + side, c : c + side] for r in steps for c in steps])
    marked = np.where(mask, frame, DIMMED * frame)
    return np.where(mask & ~inner, np.array(YELLOW, np.float32)[:, None, None] / 255, marked)
