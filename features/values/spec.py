"""The types in the store's interface: tokens, text states, the store's spec and its fingerprint.

Shape legend: B clips, T frames, N patches a frame (rows x cols) of D channels, M coarse patches a frame of E channels,
L text tokens.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Literal, get_args

from egopatch.features.common.units import counted

if TYPE_CHECKING:  # see `features`
    import torch
    from torch import Tensor

Scalar = str | int | float | bool | None
StoredDtype = Literal["float16", "bfloat16", "float32", "float8_e4m3", "int8"]
Codec = Literal["none", "zstd", "blosc-zstd", "gzip"]
TOKEN_ARRAYS = ("patches", "coarse", "states")  # arrays in the stored dtype; the others have dtypes of their own
QUANTISED = ("int8", "float8_e4m3")  # dtypes that need a scale for each patch


def unscaled_dtype(dtype: StoredDtype) -> StoredDtype:
    """The dtype of tokens without a scale, in a store whose patches have `dtype`."""
    return "float16" if dtype in QUANTISED else dtype


def keep_count(ratio: float, patches: int) -> int:
    """k = ceil(ratio * N), at least 1, unaffected by the rounding error of a ratio such as 0.07."""
    return max(1, min(patches, math.ceil(round(ratio * patches, 6))))


def middle_indices(count: int, wanted: int) -> list[int]:
    """Index of the item in the middle of each of `wanted` equal spans of `count` items, such as frames of a clip."""
    return [(2 * span + 1) * count // (2 * wanted) for span in range(wanted)]


def _row_shapes(patches: Sequence[int], coarse: Sequence[int] | None) -> dict[str, tuple[int, ...]]:
    """Array -> its shape for one clip, beside patches [T, N, D] and coarse patches [T, M, E]."""
    t, n, d = patches
    shapes = {"cls": (d,), "saliency": (t, n), "timestamps": (t,), "scale": (t, n), "positions": (t, n)}
    if coarse is None:
        return shapes
    _, m, e = coarse
    return shapes | {"coarse": (t, m, e), "coarse_saliency": (t, m)}


@dataclass(frozen=True)
class PatchTokens:
    """Encoder output for B clips; every tensor has the batch first.

    Attributes:
        cls: [B, D].
        patches: [B, T, N, D].
        saliency: [B, T, N], attention of CLS to each patch, mean over heads, before softmax.
        timestamps: [B, T], seconds from the clip's start to each encoded frame.
        coarse: [B, T, M, E], tokens on a coarser grid, where the network has one.
        coarse_saliency: [B, T, M].
        scale: [B, T, N], factor of each patch where `patches` is int8 or float8.
        positions: [B, T, N], index of each patch in the full grid, in a derived store that keeps only some of them.

    Raises:
        ValueError: A tensor's shape disagrees with `patches`; the message names the tensor.
    """

    cls: "Tensor"
    patches: "Tensor"
    saliency: "Tensor"
    timestamps: "Tensor | None" = None
    coarse: "Tensor | None" = None
    coarse_saliency: "Tensor | None" = None
    scale: "Tensor | None" = None
    positions: "Tensor | None" = None

    def __post_init__(self) -> None:
        if self.patches.ndim != 4:
            raise ValueError(f"patches has shape {tuple(self.patches.shape)}; expected [B, T, N, D]")
        if self.coarse is not None and self.coarse.ndim != 4:
            raise ValueError(f"coarse has shape {tuple(self.coarse.shape)}; expected [B, T, M, E]")
        b, *patches = self.patches.shape
        rows = _row_shapes(patches, None if self.coarse is None else self.coarse.shape[1:])
        for name, row in rows.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != (b, *row):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; expected {(b, *row)} beside patches {(b, *patches)}"
                )

    def tensors(self) -> "dict[str, Tensor]":
        """The tensors that are present, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def to(self, device: "torch.device | str", non_blocking: bool = False) -> "PatchTokens":
        """A copy on `device`."""
        return PatchTokens(**{k: v.to(device, non_blocking=non_blocking) for k, v in self.tensors().items()})


@dataclass(frozen=True)
class TextStates:
    """Text network output for B questions.

    Attributes:
        states: [B, L, D].
        attention_mask: [B, L] bool, true for tokens and false for padding.

    Raises:
        ValueError: A tensor has another shape; the message names it.
    """

    states: "Tensor"
    attention_mask: "Tensor"

    def __post_init__(self) -> None:
        if self.states.ndim != 3:
            raise ValueError(f"states has shape {tuple(self.states.shape)}; expected [B, L, D]")
        if self.attention_mask.shape != self.states.shape[:2]:
            raise ValueError(
                f"attention_mask has shape {tuple(self.attention_mask.shape)}; expected {tuple(self.states.shape[:2])}"
            )


_FIELDS = {"patches": fields(PatchTokens), "text": fields(TextStates)}
_ARRAYS = {kind: tuple(field.name for field in held) for kind, held in _FIELDS.items()}
_REQUIRED = {kind: tuple(field.name for field in held if field.default is MISSING) for kind, held in _FIELDS.items()}


def _are_counts(values: object) -> bool:
    """Whether `values` is a tuple of ints of at least 1; NumPy's would not read back from JSON."""
    return isinstance(values, tuple) and all(type(value) is int and value >= 1 for value in values)


@dataclass(frozen=True)
class ArraySpec:
    """One named array of a store; `shape` is the shape of a single row.

    Raises:
        ValueError: `shape` is not a tuple of ints of at least 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not _are_counts(self.shape):
            raise ValueError(
                f"array {self.name!r} has row shape {self.shape!r}; expected a tuple of ints of at least 1"
            )


@dataclass(frozen=True)
class StoreSpec:
    """The shape of a store.

    Attributes:
        kind: `patches` (rows are clips) or `text` (rows are question texts).
        arrays: Arrays that hold a row for each clip or text.
        shard: Rows in a shard.
        grid: Rows and columns of the patch grid; None for text.
        codec: Compression of rows on disk; it changes no value.

    Raises:
        ValueError: An attribute has a value that no store can have, or two arrays, or an array and the grid, do not
            fit together; the message names them.
    """

    kind: Literal["patches", "text"]
    arrays: tuple[ArraySpec, ...]
    shard: int = 64
    grid: tuple[int, int] | None = None
    codec: Codec = "none"

    def __post_init__(self) -> None:
        if self.kind not in _ARRAYS:
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(_ARRAYS)}")
        if not _are_counts((self.shard,)):
            raise ValueError(f"shard is {self.shard!r}; expected at least 1 row, as an int")
        if self.codec not in get_args(Codec):
            raise ValueError(f"codec is {self.codec!r}; expected one of {', '.join(get_args(Codec))}")
        if self.grid is not None and not (_are_counts(self.grid) and len(self.grid) == 2):
            raise ValueError(f"grid is {self.grid!r}; expected at least 1 row and 1 column, as a tuple of ints")
        names = [array.name for array in self.arrays]
        for name in names:
            # Each name becomes a file's name and a field of PatchTokens or TextStates.
            if name not in _ARRAYS[self.kind] or names.count(name) > 1:
                expected = ", ".join(_ARRAYS[self.kind])
                raise ValueError(f"array {name!r} is unknown or repeated; a store of {self.kind} can keep {expected}")
        required = _REQUIRED[self.kind]
        if missing := [name for name in required if name not in names]:
            raise ValueError(f"array {missing[0]!r} is missing; a store of {self.kind} needs {', '.join(required)}")
        if self.kind == "patches":
            dtype = self.array("patches").dtype
            if dtype in QUANTISED and "scale" not in names:
                raise ValueError(f"array 'patches' has dtype {dtype}, which needs an array 'scale'; add it")
            self._require_fitting({array.name: array.shape for array in self.arrays})

    def _require_fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse arrays of clips that do not fit one another or the grid, with the names of both."""
        for name, axes in (("patches", "[T, N, D]"), ("coarse", "[T, M, E]")):
            if name in shapes and len(shapes[name]) != 3:
                raise ValueError(f"array {name!r} has row shape {shapes[name]}; expected {axes}")
        patches = shapes["patches"]
        for name, expected in _row_shapes(patches, shapes.get("coarse")).items():
            if name in shapes and shapes[name] != expected:
                raise ValueError(
                    f"array {name!r} has row shape {shapes[name]}; expected {expected} beside patches {patches}"
                )
        if self.grid:
            count, whole = patches[1], math.prod(self.grid)
            if count != whole and ("positions" not in shapes or count > whole):  # with positions, some may be left out
                raise ValueError(
                    f"grid is {self.grid}, but array 'patches' has {counted(count, 'patch', 'patches')} a frame, "
                    f"not {whole}"
                )

    @classmethod
    def for_patches(
        cls,
        frames: int,
        grid: tuple[int, int],
        width: int,
        dtype: StoredDtype = "float16",
        shard: int = 64,
        coarse: int | None = None,
        coarse_width: int | None = None,
        codec: Codec = "none",
    ) -> "StoreSpec":
        """The spec of a clip store: `frames` is T, rows x cols of `grid` is N, `width` is D.

        `coarse` is M where there are coarse tokens; `coarse_width` is E where it differs from D.
        """
        n = grid[0] * grid[1]
        arrays = [
            ArraySpec("patches", (frames, n, width), dtype),
            ArraySpec("cls", (width,), "float32"),
            ArraySpec("saliency", (frames, n), "float32"),
            ArraySpec("timestamps", (frames,), "float32"),
        ]
        if dtype in QUANTISED:
            arrays.append(ArraySpec("scale", (frames, n), "float32"))
        if coarse is not None:
            arrays.append(ArraySpec("coarse", (frames, coarse, coarse_width or width), unscaled_dtype(dtype)))
            arrays.append(ArraySpec("coarse_saliency", (frames, coarse), "float32"))
        return cls("patches", tuple(arrays), shard, grid, codec)

    @classmethod
    def for_text(
        cls, length: int, width: int, dtype: StoredDtype = "float16", shard: int = 1024, codec: Codec = "none"
    ) -> "StoreSpec":
        """The spec of a store of text states: `length` is L, `width` is D."""
        return cls(
            "text",
            (
                ArraySpec("states", (length, width), unscaled_dtype(dtype)),
                ArraySpec("attention_mask", (length,), "bool"),
            ),
            shard,
            codec=codec,
        )

    def array(self, name: str) -> ArraySpec:
        """The array called `name`.

        Raises:
            KeyError: The store has no array of that name.
        """
        for array in self.arrays:
            if array.name == name:
                return array
        raise KeyError(f"array {name!r} does not exist; the store has {', '.join(a.name for a in self.arrays)}")


@dataclass(frozen=True)
class Fingerprint:
    """Every setting that decides the values in a store, by name; two stores differ where their fingerprints do.

    Raises:
        ValueError: A name is not text, or a value is not text, a number, true, false or None; the message has both.
    """

    fields: Mapping[str, Scalar]

    def __post_init__(self) -> None:
        if not isinstance(self.fields, Mapping):
            raise ValueError(f"fingerprint is {self.fields!r:.60}; expected a mapping from names of settings to values")
        for name, value in self.fields.items():
            if not isinstance(name, str):
                raise ValueError(f"fingerprint has the name {name!r:.60}; expected text")
            if not isinstance(value, Scalar) or value != value:
                expected = "text, a number, true, false or None, as Python's own types"
                raise ValueError(f"fingerprint has {name!r} = {value!r:.60}; expected {expected}")

    @property
    def digest(self) -> str:
        """SHA-256 of the fields, in hexadecimal."""
        return hashlib.sha256(json.dumps(dict(self.fields), sort_keys=True).encode()).hexdigest()

    def differences(self, other: "Fingerprint", this: str, that: str) -> list[str]:
        """One line for each field that differs, such as `depth: store has 6, requested 12`.

        Args:
            other: Fingerprint to compare with.
            this: Words before the values of this fingerprint, such as `store has`.
            that: Words before the values of the other one, such as `requested`.
        """
        names = sorted(self.fields.keys() | other.fields.keys())
        pairs = [(name, self.fields.get(name, "absent"), other.fields.get(name, "absent")) for name in names]
        return [f"{name}: {this} {mine!r}, {that} {theirs!r}" for name, mine, theirs in pairs if mine != theirs]
