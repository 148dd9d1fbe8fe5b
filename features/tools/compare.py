"""Compares two sets of features: whether they agree, by how much they differ, and the likely cause.

Shape legend: C clips, T frames, N patches a frame, D channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from egopatch.features.state.header import HEADER
from egopatch.features.store.store import open_store
from egopatch.features.tools.feature_files import ReadClip, find_clips
from egopatch.features.tools.importing import patches_of
from egopatch.features.values.errors import StoreError
from egopatch.features.values.location import Location
from egopatch.features.values.tensors import dtype_name

# Cause -> the fingerprint fields that point to it, the most telling cause first.
CAUSES = {
    "weights": ("arch", "variant", "path", "checkpoint", "package", "plugin", "model_type"),
    "depth": ("depth",),
    "frames": ("frames", "sampling", "short", "tubelet"),
    "transform": ("transform", "size"),
    "precision": ("compute_dtype", "compile", "stored_dtype", "converted_from"),
}
ADVICE = {
    "weights": "another network or checkpoint, or another path through the network",
    "depth": "tokens of another block",
    "frames": "other frames of the video",
    "transform": "frames that are resized, cropped or normalised differently",
    "precision": "rounding in another dtype",
    "shift": "the clips are in another order",
    "scale": "the same tokens, multiplied by a number",
    "shape": "tokens of another shape",
    "unknown": "other frames, transform, depth or weights; the features do not show which",
}
# Relative error up to which features agree: twice the rounding of float16 and of bfloat16.
TOLERANCES = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-18, "float8_e4m3": 0.06, "int8": 0.03}
# Relative errors that bfloat16 arithmetic through all blocks explains: if no field names a cause, and at most.
ROUNDING, MOST_ROUNDING = 0.03, 0.3
CLIPS = 64
RUN = 16  # consecutive clips in each group that is compared, so that a shift shows
CLOSEST = 3  # number of clips, tokens and channels that are named


@dataclass(frozen=True)
class Measure:
    """How close the vectors of A and B are.

    Attributes:
        name: The clip, the token (frame and patch) or the channel.
        cosine: Cosine of the two vectors.
        error: Length of their difference, over the length of B's.
    """

    name: str
    cosine: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """The result of comparing A and B.

    Attributes:
        agree: Whether they differ by no more than rounding to the coarser of their stored dtypes.
        cause: The likely cause of the difference, a key of `ADVICE`; None if all bits are equal.
        verdict: One sentence.
        clips: Number of clips that were compared.
        common, only_a, only_b: Number of clips in both, in A alone and in B alone.
        cosine, error: Over all clips, as in `Measure`.
        worst_clips, worst_tokens, worst_channels: The clips, tokens and channels that differ most.
        times_differ_s: Largest difference of the frames' times in seconds; None if A or B has no times.
        fields: One line for each field of the fingerprints that differs.
    """

    agree: bool
    cause: str | None
    verdict: str
    clips: int
    common: int
    only_a: int
    only_b: int
    cosine: float
    error: float
    worst_clips: tuple[Measure, ...]
    worst_tokens: tuple[Measure, ...]
    worst_channels: tuple[Measure, ...]
    times_differ_s: float | None
    fields: tuple[str, ...]


class Features(NamedTuple):
    """The part of a clip that is compared: patches [T, N, D], and the frames' times [T], None if unknown."""

    patches: Tensor
    times: Tensor | None


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a store, or features in files of another program.

    Attributes:
        ids: Ids of the clips, in order; at least one.
        dtype: Name of the dtype that the patches are stored in.
        fingerprint: Fields of the store's fingerprint; empty for files.
        read: Reads one clip, in float32.
    """

    ids: tuple[str, ...]
    dtype: str
    fingerprint: Mapping[str, object]
    read: Callable[[str], Features]


def _side(place: Location | str) -> Side:
    """The store or the files at `place`; errors as in `compare`."""
    if isinstance(place, Path) and not (place / HEADER).exists():
        return _side_of_files(dict(find_clips(place)))
    store = open_store(place)
    if store.spec.kind != "patches":
        raise StoreError(f"store {place} holds {store.spec.kind} rows; expected clips")
    if not store.clip_ids:
        raise StoreError(f"store {place} holds no clip yet; expected encoded clips: run `extract run` first")

    def read(name: str) -> Features:
        tokens = store.read([name], torch.float32)
        return Features(tokens.patches[0], None if tokens.timestamps is None else tokens.timestamps[0])

    return Side(store.clip_ids, store.spec.array("patches").dtype, store.fingerprint.fields, read)


def _side_of_files(files: Mapping[str, ReadClip]) -> Side:
    def read_stored(name: str) -> Features:
        try:
            arrays = files[name]()
            return Features(patches_of(arrays), arrays.get("timestamps"))
        except (ValueError, OSError) as error:
            raise StoreError(f"clip {name!r}: {error}") from None

    def read(name: str) -> Features:
        patches, times = read_stored(name)
        return Features(patches.float(), None if times is None else times.float())

    ids = tuple(sorted(files))
    return Side(ids, dtype_name(read_stored(ids[0]).patches.dtype), {}, read)


def compare(
    a: Location | str, b: Location | str, clips: int = CLIPS, on_clips: Callable[[int, int], None] | None = None
) -> Comparison:
    """Compare the clips that A and B have in common.

    If only one of A and B has patches averaged over each frame, or over the clip, the other's are averaged too.

    Args:
        a: A store, or a folder or HDF5 file of features as `import_features` takes them.
        b: Likewise.
        clips: Largest number of clips to compare, in runs that are spread evenly over the common ones.
        on_clips: Called with the number of clips done, and of all clips.

    Raises:
        StoreError: A or B cannot be read, they have no clip in common, or their clips have several shapes.
    """
    left, right = _side(a), _side(b)
    both = set(left.ids) & set(right.ids)
    common = [name for name in left.ids if name in both]
    if not common:
        raise StoreError(
            f"{a} and {b} have no clip in common: A has {left.ids[0]!r}, B has {right.ids[0]!r}; expected the same ids"
        )
    runs = [common[start : start + RUN] for start in range(0, len(common), RUN)]
    picked = [name for run in runs[:: -(-len(common) // clips)] for name in run][:clips]
    sums = _Sums()
    for number, name in enumerate(picked, start=1):
        sums.add(name, left.read(name), right.read(name))
        if on_clips is not None:
            on_clips(number, len(picked))
    differing = [
        name
        for name in sorted(left.fingerprint.keys() | right.fingerprint.keys())
        if left.fingerprint.get(name) != right.fingerprint.get(name)
    ]
    known = all(side.fingerprint and side.fingerprint.get("origin") != "imported" for side in (left, right))
    tolerance = max(TOLERANCES.get(side.dtype, TOLERANCES["float32"]) for side in (left, right))
    compared = sums.measured()
    cause, detail = _cause(sums, compared, tolerance, differing if known else [])
    clips_apart, tokens_apart, channels_apart = sums.worst()
    agree = sums.unlike_shapes is None and compared.error <= tolerance and cause in (None, "precision")
    return Comparison(
        agree=agree,
        cause=cause,
        verdict=_verdict(agree, cause, detail, left, right),
        clips=len(picked),
        common=len(common),
        only_a=len(left.ids) - len(common),
        only_b=len(right.ids) - len(common),
        cosine=compared.cosine,
        error=compared.error,
        worst_clips=clips_apart,
        worst_tokens=tokens_apart,
        worst_channels=channels_apart,
        times_differ_s=sums.times_differ_s,
        fields=tuple(
            f"{name}: A has {left.fingerprint.get(name)!r}, B has {right.fingerprint.get(name)!r}" for name in differing
        ),
    )


def _verdict(agree: bool, cause: str | None, detail: str, left: Side, right: Side) -> str:
    if cause is None:
        return "A and B agree in every bit"
    dtypes = f" ({left.dtype} and {right.dtype})" if cause == "precision" and left.dtype != right.dtype else ""
    why = f"{ADVICE[cause]}{dtypes}{f': {detail}' if detail else ''}"
    return f"A and B agree up to {why}" if agree else f"A and B differ; likely cause: {cause}, {why}"


def _cause(sums: "_Sums", compared: Measure, tolerance: float, differing: list[str]) -> tuple[str | None, str]:
    """Key in `ADVICE` and the evidence for it, such as fields of the fingerprints that are known to be `differing`."""
    if sums.unlike_shapes is not None:
        in_a, in_b = sums.unlike_shapes
        # Frames and transform decide how many tokens there are, network and depth how many channels they have.
        order = ("frames", "transform", "weights") if in_a[-1] == in_b[-1] else ("weights", "depth")
        cause = _field_cause(differing, order) or "shape"
        return cause, f"{in_a} in A, {in_b} in B"
    if compared.error == 0 and not sums.times_differ_s:
        return None, ""
    if compared.error <= tolerance and not (sums.times_differ_s or 0) > 1e-3:
        return "precision", ""
    if (shift := sums.clip_shift()) is not None:
        return "shift", f"clip i of A is clip i + {shift} of B" if shift else "each clip of A is another clip of B"
    if (sums.times_differ_s or 0) > 1e-3:
        return "frames", f"their times differ by up to {sums.times_differ_s:.3g} s"
    if (factor := sums.factor(tolerance)) is not None:
        return "scale", f"A is {factor:.4g} times B"
    if (offset := sums.frame_shift()) is not None:
        return "frames", f"frame t of A is frame t + {offset} of B"
    # Rounding cannot explain a large error, whatever dtype a fingerprint names.
    named = _field_cause(differing, tuple(CAUSES) if compared.error <= MOST_ROUNDING else tuple(CAUSES)[:-1])
    if named is not None:
        return named, ", ".join(name for name in CAUSES[named] if name in differing)
    return ("precision", "") if compared.error <= ROUNDING else ("unknown", "")


def _field_cause(differing: list[str], order: tuple[str, ...]) -> str | None:
    """The first cause in `order` that a differing field points to; None if none does."""
    return next((cause for cause in order if not set(differing).isdisjoint(CAUSES[cause])), None)


class _Sums:
    """Sums that a comparison needs over its clips, which are read one by one. Shifts and factor need at least one clip.

    Attributes:
        unlike_shapes: The first two shapes that cannot be compared; None if all can.
        times_differ_s: Largest difference of the frames' times in seconds; None if unknown.
    """

    def __init__(self) -> None:
        self.unlike_shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self.times_differ_s: float | None = None
        self._shape: tuple[int, ...] | None = None  # of every clip: places and channels are summed over all
        self._clips: list[Measure] = []
        # Sums of <a, b>, <a, a>, <b, b> and the squared difference, once a clip was added: [4, T, N] and [4, D].
        self._tokens = self._channels = torch.zeros(())
        self._means: list[tuple[Tensor, Tensor]] = []  # [T, D] of each clip

    def add(self, name: str, a: Features, b: Features) -> None:
        """Add a clip, as A and B have it."""
        if a.times is not None and b.times is not None and a.times.shape == b.times.shape == (len(a.patches),):
            gaps = (a.times - b.times).abs().nan_to_num(nan=float("inf"))  # a time that is not a number differs
            self.times_differ_s = max(self.times_differ_s or 0.0, float(gaps.max()))
        x, y = _pooled_alike(a.patches, b.patches)
        if x.shape != y.shape:
            self.unlike_shapes = self.unlike_shapes or (tuple(x.shape), tuple(y.shape))
            return
        self._shape = self._shape or tuple(x.shape)
        if x.shape != self._shape:
            raise StoreError(
                f"clip {name!r} has patches of shape {tuple(x.shape)} in A and B, but other clips have {self._shape};"
                " expected one shape: put the clips of each shape in a separate folder, and compare these folders"
            )
        products = torch.stack([x * y, x * x, y * y, (x - y).square()]).double()
        self._clips.append(_measure(name, products.sum(dim=(1, 2, 3))))
        self._tokens = self._tokens + products.sum(dim=3)
        self._channels = self._channels + products.sum(dim=(1, 2))
        self._means.append((x.mean(dim=1), y.mean(dim=1)))

    def measured(self) -> Measure:
        """The measure over all clips."""
        return _measure("all", self._channels.sum(dim=1)) if self._clips else Measure("all", 0.0, float("inf"))

    def worst(self) -> tuple[tuple[Measure, ...], tuple[Measure, ...], tuple[Measure, ...]]:
        """The clips, the places in frame and grid, and the channels that differ most; the last two over all clips."""
        if not self._clips:
            return (), (), ()
        _, frames, patches = self._tokens.shape
        places = [(t, n) for t in range(frames) for n in range(patches)]
        tokens = [_measure(f"frame {t} patch {n}", self._tokens[:, t, n]) for t, n in places]
        channels = [_measure(f"channel {d}", self._channels[:, d]) for d in range(self._channels.shape[1])]
        return _worst(self._clips), _worst(tokens), _worst(channels)

    def factor(self, tolerance: float) -> float | None:
        """The number by which A is a multiple of B; None if it is not a multiple."""
        dot, xx, yy, _ = self._channels.sum(dim=1).tolist()
        if not dot or not yy:
            return None
        factor = dot / yy
        rest = max(xx - factor * dot, 0.0) ** 0.5 / max(xx, 1e-30) ** 0.5
        return factor if rest <= 2 * tolerance and abs(factor - 1) > tolerance else None

    def clip_shift(self) -> int | None:
        """Number of clips by which most clips of A come later in B; 0 if it varies; None if they are not shifted."""
        if len(self._means) < 3:
            return None
        similar = _similarity(*(torch.stack([pair[side].mean(dim=0) for pair in self._means]) for side in (0, 1)))
        return _shift(similar)

    def frame_shift(self) -> int | None:
        """Number of frames by which most frames of A come later in B; None if it varies or they are not shifted."""
        if len(self._means[0][0]) < 3:
            return None
        similar = torch.stack([_similarity(x, y) for x, y in self._means]).mean(dim=0)
        return _shift(similar) or None


def _pooled_alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both, averaged to one patch a frame, or to one frame, if one of them has only that."""
    if 1 in (x.shape[1], y.shape[1]) and x.shape[1] != y.shape[1]:
        x, y = x.mean(dim=1, keepdim=True), y.mean(dim=1, keepdim=True)
    if 1 in (len(x), len(y)) and len(x) != len(y):
        x, y = x.mean(dim=0, keepdim=True), y.mean(dim=0, keepdim=True)
    return x, y


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """[n, n] minus the distance between each of `x` [n, D] and each of `y` [n, D]."""
    return -torch.cdist(x.double(), y.double())


def _shift(similar: Tensor) -> int | None:
    """Distance from most rows to their nearest column; 0 if it varies; None if most rows are not shifted.

    A nearest column counts only if it is far nearer than the row's own: features that differ all over are not shifted.
    """
    nearest = similar.argmax(dim=1)
    rows = torch.arange(len(similar))
    own = -similar.diagonal()
    clear = -similar.max(dim=1).values < 0.1 * own
    moved = clear & (nearest != rows)
    if moved.float().mean() < 0.5:
        return None
    distances = (nearest - rows)[moved]
    common = int(distances.mode().values)
    return common if (distances == common).float().mean() >= 0.5 else 0


def _measure(name: str, sums: Tensor) -> Measure:
    """The measure from `sums`: <a, b>, <a, a>, <b, b> and the squared difference."""
    dot, xx, yy, difference = sums.tolist()
    cosine = dot / (xx * yy) ** 0.5 if xx and yy else float(xx == yy)
    error = 0.0 if not difference else (difference / yy) ** 0.5 if yy else float("inf")
    return Measure(name, cosine, error)


def _worst(measures: list[Measure]) -> tuple[Measure, ...]:
    return tuple(sorted(measures, key=lambda measure: -measure.error)[:CLOSEST])
