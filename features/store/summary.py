"""A store at a glance, for a prompt or a notebook: what it holds, what made it, how to read it, a clip's picture."""

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from egopatch.features.common.pictures import dim, sheet
from egopatch.features.store.pixels import to_pixels
from egopatch.features.values.spec import PatchTokens, middle_indices

SIDE = 224  # pixels of a frame in a picture


def as_text(facts: Sequence[tuple[str, str]]) -> str:
    """Facts on a store, by name, one a line."""
    width = 2 + max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}{value}" for name, value in facts)


def as_html(facts: Sequence[tuple[str, str]]) -> str:
    """The facts as a table."""
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f"<table>{''.join(rows)}</table>"


def draw(tokens: PatchTokens, grid: tuple[int, int], frames: NDArray[np.float32] | None) -> Image.Image:
    """The picture of `Store.show`, of the first clip in `tokens`."""
    saliency = tokens.saliency[0]
    steps = len(saliency)
    if frames is None:
        frames = np.ones((steps, 3, SIDE, SIDE), np.float32)
    frames = np.asarray(frames)  # such as a tensor
    if frames.ndim != 4 or frames.shape[1] != 3 or len(frames) < steps:
        raise ValueError(f"frames has shape {frames.shape}; expected [{steps} or more, 3, height, width] in [0, 1]")
    if frames.dtype.kind != "f":
        raise ValueError(f"frames has dtype {frames.dtype}; expected float32 in [0, 1]: divide values up to 255 by 255")
    if frames.size and not (frames.min() > -0.5 and frames.max() < 1.5):  # bicubic resizing overshoots a little
        raise ValueError(
            f"frames has values from {frames.min():g} to {frames.max():g}; expected [0, 1]: divide values up to 255 by"
            " 255, and undo a normalisation"
        )
    positions = None if tokens.positions is None else tokens.positions[0]
    height, width = frames.shape[2:]
    maps = to_pixels(saliency, grid, height, width, positions=positions).numpy()
    low, high = np.nanmin(maps), np.nanmax(maps)
    light = (maps - low) / max(float(high - low), 1e-12)
    # A position in time may cover several frames: the one in its middle is shown.
    shown = frames[middle_indices(len(frames), steps)]
    times = [None] * steps if tokens.timestamps is None else tokens.timestamps[0].tolist()
    captions = [f"frame {step}" if time is None else f"{time:.2f} s" for step, time in enumerate(times)]
    return sheet([(dim(frame, bright), caption) for frame, bright, caption in zip(shown, light, captions, strict=True)])
