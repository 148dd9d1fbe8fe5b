"""Turns features that another program wrote into a store, on which heads train as on any other."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from torch import Tensor

from egopatch.features.common.command_line import pick_varied
from egopatch.features.common.units import counted
from egopatch.features.state.ids import check_id
from egopatch.features.store.create import create_store
from egopatch.features.store.store import Store
from egopatch.features.tools.convert import require_separate
from egopatch.features.tools.feature_files import ReadClip, Unread, find_clips
from egopatch.features.values.errors import StoreError
from egopatch.features.values.location import Location, parse_location
from egopatch.features.values.spec import ArraySpec, Fingerprint, StoreSpec
from egopatch.features.values.tensors import bytes_of, torch_dtype

SHOWN_FAULTS = 10
# Arrays that may come beside the patches; `_read_row` computes the first two if they are missing.
BESIDE = ("cls", "saliency", "timestamps")


@dataclass(frozen=True)
class _Row:
    """A clip's arrays as they are stored, and the rows and columns of its patches."""

    arrays: dict[str, Tensor]
    grid: tuple[int, int]


ReadRow = Callable[[], _Row]  # errors as in `_read_row`


def import_features(
    source: Path,
    to: Location | str,
    dtype: str = "float16",
    grid: tuple[int, int] | None = None,
    shard: int = 64,
    format: str = "zarr",
    on_clips: Callable[[int, int], None] | None = None,
) -> Store:
    """Create a store of the clips in `source`; `tools.feature_files` lists the layouts.

    Patches may be [T, N, D], [T, rows, cols, D], [T, D] or [D]; the last two become one patch a frame. Without `cls`,
    CLS is the mean of the patches; without `saliency`, saliency is the length of each patch. Other arrays, such as
    `coarse`, are not stored. The fingerprint says `origin: imported` and has a hash of the content. Everything is
    checked before the store is created, so files are read twice.

    Args:
        source: Folder or HDF5 file.
        to: Folder or URL of the store; an interrupted import resumes.
        dtype: Dtype of the patches on disk: float16, bfloat16 or float32.
        grid: Rows and columns of the patches; None: those of [T, rows, cols, D], else a square if N is one, else 1 x N.
        shard: Number of clips in a shard.
        format: File format of the store.
        on_clips: Called with the numbers of clips done and of all clips; each clip counts twice.

    Raises:
        StoreError: Files are missing, empty or damaged, hold NaN, or differ in shape; the message names clips and
            faults. Or `to` is in `source`; or a clip changes while it is imported, and the store stays incomplete.
    """
    require_separate(source, parse_location(to), what="features")
    found = _distinct(find_clips(source), source)
    clips = {name: partial(_read_row, read, dtype, grid) for name, read in found.items()}
    done = count(1)

    def tick() -> None:
        if on_clips is not None:
            on_clips(next(done), 2 * len(clips))

    shapes, found_grid, hashes = _check_all(clips, source, tick)
    content = hashlib.sha256(b"".join(map(bytes.fromhex, hashes.values()))).hexdigest()
    arrays = tuple(ArraySpec(key, shape, dtype if key == "patches" else "float32") for key, shape in shapes.items())
    fields = {"origin": "imported", "arch": "imported", "content": content, "stored_dtype": dtype}
    spec = StoreSpec("patches", arrays, shard, found_grid)
    store = create_store(to, spec, Fingerprint(fields), list(clips), format, "--to")
    _write_missing(store, clips, source, hashes, tick)
    return store


def _check_all(
    clips: Mapping[str, ReadRow], source: Path, tick: Callable[[], None]
) -> tuple[Mapping[str, tuple[int, ...]], tuple[int, int], Mapping[str, str]]:
    """Read every clip once; `tick` is called after each that can be stored.

    Returns:
        Shape of each array of a clip, rows and columns of the patches, and the SHA-256 of each clip as it is stored.

    Raises:
        StoreError: As `import_features`.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    grids: list[tuple[int, int]] = []
    faults: dict[str, str] = {}
    hashes: dict[str, str] = {}
    for name, read in clips.items():
        try:
            row = read()
        except (ValueError, OSError) as error:
            faults[name] = str(error)
            continue
        shapes[name] = {key: tuple(value.shape) for key, value in row.arrays.items()}
        grids.append(row.grid)
        hashes[name] = _content(name, row.arrays)
        tick()
    faults |= _odd_shapes(shapes)
    if faults:
        lines = pick_varied([f"{source}: {name!r}: {fault}" for name, fault in faults.items()], SHOWN_FAULTS)
        rest = len(faults) - len(lines)
        raise StoreError("; ".join([*lines, *([f"and {rest} more"] if rest else [])]) + ": nothing was imported")
    return next(iter(shapes.values())), grids[0], hashes


def _write_missing(
    store: Store, clips: Mapping[str, ReadRow], source: Path, hashes: Mapping[str, str], tick: Callable[[], None]
) -> None:
    """Write the clips that the store does not have yet, shard by shard; `tick` is called after each.

    Raises:
        StoreError: A clip cannot be read any more, or no longer has its hash in `hashes`.
    """
    for work in store.missing_shards():
        rows = {}
        for name in work.ids:
            try:
                rows[name] = clips[name]().arrays
                if _content(name, rows[name]) != hashes[name]:
                    raise ValueError("it has other values")
            except (ValueError, OSError) as error:
                raise StoreError(
                    f"{source}: {name!r} has changed since it was checked ({error}), so the store {store.path} is "
                    "incomplete; delete it, and import again once no program writes the features any more"
                ) from error
        store.write_shard(work.shard, rows, {name: hashes[name] for name in rows})
        for _ in rows:
            tick()


def _distinct(unread: Iterable[Unread], source: Path) -> dict[str, ReadClip]:
    """Id -> function that reads the clip, sorted by id."""
    found: dict[str, ReadClip] = {}
    for name, read in unread:
        check_id(name, "patches")
        if name in found:
            raise StoreError(f"{source} has the clip {name!r} twice; expected each id once: nothing was imported")
        found[name] = read
    return dict(sorted(found.items()))


def _read_row(read: ReadClip, dtype: str, grid: tuple[int, int] | None) -> _Row:
    """The clip that `read` returns, as it is stored; `dtype` and `grid` as in `import_features`.

    Raises:
        ValueError: The clip cannot be stored.
        OSError: It cannot be read.
    """
    arrays = read()
    patches = patches_of(arrays).to(torch_dtype(dtype))
    if not patches.isfinite().all():
        raise ValueError(f"patches exceed the range of {dtype}; use another --dtype")
    rows_cols = _grid(arrays["patches"], patches.shape[1], grid)
    row = {"patches": patches, "cls": patches.float().mean(dim=(0, 1)), "saliency": patches.float().norm(dim=-1)}
    row |= {key: arrays[key].float() for key in BESIDE if key in arrays}
    frames, count, width = patches.shape
    expected = {"cls": (width,), "saliency": (frames, count), "timestamps": (frames,)}
    for key in BESIDE:
        if key in row and tuple(row[key].shape) != expected[key]:
            joined = (
                "; if this is a whole video, export it with --by clip" if key == "cls" and row[key].ndim == 2 else ""
            )
            raise ValueError(
                f"{key} has shape {tuple(row[key].shape)}; expected {expected[key]} beside the patches{joined}"
            )
        if key in row and not row[key].isfinite().all():
            raise ValueError(f"{key} holds NaN or infinity")
    return _Row(row, rows_cols)


def patches_of(arrays: Mapping[str, Tensor]) -> Tensor:
    """[T, N, D]: the patches of a clip, in any of the shapes that `import_features` takes.

    Raises:
        ValueError: They have another number of dimensions, are empty, or hold NaN or infinity.
    """
    given = arrays["patches"]
    if not given.numel():
        raise ValueError(f"patches have shape {tuple(given.shape)}; expected at least one value")
    if not given.isfinite().all():
        raise ValueError("patches hold NaN or infinity")
    if given.ndim == 1:
        return given[None, None]
    if given.ndim == 2:
        return given[:, None]
    if given.ndim == 4:
        return given.flatten(1, 2)
    if given.ndim != 3:
        raise ValueError(
            f"patches have shape {tuple(given.shape)}; expected [T, N, D], [T, rows, cols, D], [T, D] or [D]"
        )
    return given


def _grid(given: Tensor, patches: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the patches."""
    if grid is None and given.ndim == 4:
        return given.shape[1], given.shape[2]
    if grid is None:
        side = int(patches**0.5)
        return (side, side) if side * side == patches else (1, patches)
    if grid[0] * grid[1] != patches:
        raise ValueError(
            f"has {counted(patches, 'patch', 'patches')} a frame; "
            f"--grid {grid[0]}x{grid[1]} expects {grid[0] * grid[1]}"
        )
    return grid


def _odd_shapes(shapes: dict[str, dict[str, tuple[int, ...]]]) -> dict[str, str]:
    """Id of each clip whose arrays differ in shape from those of most clips -> its fault."""
    kinds = Counter(tuple(sorted(arrays.items())) for arrays in shapes.values())
    if len(kinds) < 2:
        return {}
    usual = dict(kinds.most_common(1)[0][0])
    odd = {}
    for name, arrays in shapes.items():
        if arrays == usual:
            continue
        key = next(key for key in (*arrays, *usual) if arrays.get(key) != usual.get(key))
        odd[name] = (
            f"{key} has shape {arrays[key]}" if key in arrays else f"{key} is missing"
        ) + f"; expected {usual.get(key, 'none')} as in most clips: all clips of a store must have the same shape"
    return odd


def _content(name: str, arrays: dict[str, Tensor]) -> str:
    """SHA-256 of a clip's arrays as they are stored, in hexadecimal."""
    digest = hashlib.sha256(name.encode())
    for key in sorted(arrays):
        digest.update(f"\0{key} {arrays[key].dtype} {tuple(arrays[key].shape)}\0".encode())
        digest.update(bytes_of(arrays[key].contiguous()).data)
    return digest.hexdigest()
