"""The rule by which frames are resized, cropped and normalised for a network, and the part of a frame it looks at.

The arithmetic is in `extract.feed.on_host` and `extract.feed.on_device`; this module needs no torch, so that a process
that only decodes starts fast.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

Resampling = Literal["bilinear", "bicubic"]
_REACH = {"bilinear": 1, "bicubic": 2}  # pixels to each side that a resampled pixel is made of


@dataclass(frozen=True)
class Transform:
    """How frames are resized, cropped and normalised.

    Attributes:
        name: Name in the store's fingerprint; it must change whenever the arithmetic changes.
        short_side: Length to which the short side is resized first; None keeps it.
        share: Side of the centre square that is cropped, as a share of the short side; None keeps the whole frame,
            which is then squeezed into a square.
        mean, std: Mean and standard deviation of R, G and B in [0, 1].
        resampling: Filter of all resizing.
        antialias: Whether the filter grows with the reduction, as in Pillow; the published networks go without.

    Raises:
        ValueError: A field has a value that no frame can be transformed with.
    """

    name: str
    short_side: int | None
    share: float | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resampling: Resampling = "bilinear"
    antialias: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name):
            raise ValueError(f"name is {self.name!r}; expected a text for the fingerprint of the store")
        for field in ("mean", "std"):
            value: object = getattr(self, field)
            numbers = value if isinstance(value, tuple | list) and len(value) == 3 else (None,)
            if not all(isinstance(number, Real) and math.isfinite(number) for number in numbers):
                raise ValueError(f"{field} is {value!r:.60}; expected three numbers, for R, G and B")
        if 0 in self.std:
            raise ValueError(f"std is {self.std}; expected numbers other than 0, by which pixels are divided")
        if not (self.short_side is None or (isinstance(self.short_side, int) and self.short_side > 0)):
            raise ValueError(f"short_side is {self.short_side!r:.60}; expected pixels as a whole number, or None")
        if not (self.share is None or (isinstance(self.share, Real) and 0 < self.share <= 1)):
            raise ValueError(f"share is {self.share!r:.60}; expected a number above 0 and at most 1, or None")
        if self.resampling not in _REACH:
            raise ValueError(f"resampling is {self.resampling!r:.60}; expected one of {', '.join(_REACH)}")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a frame after the first resizing."""
        if self.short_side is None:
            return height, width
        # The short side is exact and the long side is rounded down, as in torchvision's Resize(int).
        short = self.short_side
        return (short, int(short * width / height)) if height <= width else (int(short * height / width), short)

    def crop(self, height: int, width: int) -> "Window":
        """The part of a resized frame of that size that is cropped, which is then resized to the network's input."""
        if self.share is None:
            return Window(0, 0, height, width)
        side = round(self.share * min(height, width))
        # Rounds half to even, as torchvision's CenterCrop.
        top, left = (round((extent - side) / 2.0) for extent in (height, width))
        return Window(top, left, side, side)

    def looks_at(self, height: int, width: int) -> "Window":
        """The part of a decoded frame of that size that the network's input depends on, perhaps a few pixels more."""
        resized = self.resized(height, width)
        crop = self.crop(*resized)
        rows = self._source(height, resized[0], crop.top, crop.height)
        columns = self._source(width, resized[1], crop.left, crop.width)
        return Window(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])

    def _source(self, extent: int, target: int, first: int, count: int) -> tuple[int, int]:
        """First and last + 1 of the pixels that `count` pixels of the resized axis, from `first` on, depend on."""
        if target == extent:
            return first, first + count
        step = extent / target
        reach = _REACH[self.resampling] * (max(step, 1.0) if self.antialias else 1.0) + 1
        low, high = ((place + 0.5) * step - 0.5 for place in (first, first + count - 1))
        return max(math.floor(low - reach), 0), min(math.ceil(high + reach) + 1, extent)


@dataclass(frozen=True)
class Window:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        """Its rows."""
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        """Its columns."""
        return slice(self.left, self.left + self.width)


# The evaluation transform of EgoVLP and EgoVLPv2.
EGOVLP_TRANSFORM = Transform(
    "resize256-bilinear centercrop256 resize imagenet", 256, 1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
)


def covered_box(height: int, width: int, transform: Transform = EGOVLP_TRANSFORM) -> tuple[float, float, float, float]:
    """The part of a frame that reaches the network: top, left, height, width in pixels of the frame.

    `features.to_pixels` lays values of patches over it.

    Raises:
        ValueError: A side of the frame is below 1.
    """
    if min(height, width) < 1:
        raise ValueError(f"the frame has {height} x {width} pixels; expected sides of at least 1")
    resized = transform.resized(height, width)
    crop = transform.crop(*resized)
    down, across = height / resized[0], width / resized[1]
    return crop.top * down, crop.left * across, crop.height * down, crop.width * across
