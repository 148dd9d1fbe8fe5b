"""Pictures of a clip: its frames in rows, each with a caption, and values of pixels laid over a frame."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLUMNS = 4
# Pixels: of the line under a frame, of the gap between frames.
CAPTION, GAP = 16, 4
DIMMED = 0.35  # share of a pixel's light that is left where its value is the lowest


def sheet(cells: Sequence[tuple[NDArray[np.float32], str]]) -> Image.Image:
    """Frames [3, S, S] in [0, 1] in rows of four, each with its caption beneath."""
    side = cells[0][0].shape[-1]
    columns, (width, height) = min(COLUMNS, len(cells)), (side + GAP, side + CAPTION)
    picture = Image.new("RGB", (columns * width - GAP, -(-len(cells) // columns) * height), "white")
    draw = ImageDraw.Draw(picture)
    for number, (frame, caption) in enumerate(cells):
        left, top = number % columns * width, number // columns * height
        pixels = (np.clip(frame, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
        picture.paste(Image.fromarray(pixels), (left, top))
        draw.text((left + 2, top + side + 2), caption, fill="black")
    return picture


def dim(frame: NDArray[np.float32], light: NDArray[np.float32]) -> NDArray[np.float32]:
    """A frame [3, H, W], dimmed where `light` [H, W] in [0, 1] is low and dark where it is NaN."""
    return frame * np.nan_to_num(DIMMED + (1 - DIMMED) * light).astype(np.float32)
