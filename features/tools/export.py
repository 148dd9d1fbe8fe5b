"""Writing a store as files that other programs read."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from egopatch.features.common.units import counted
from egopatch.features.io.files import errors_of_temporary, make_folder, rename_into_place, write_errors_explained
from egopatch.features.state.origin import Origin
from egopatch.features.store.store import Store, open_store
from egopatch.features.tools.convert import OnProgress, require_separate
from egopatch.features.tools.feature_files import WRITERS, Clip
from egopatch.features.values.errors import StoreError
from egopatch.features.values.location import Location, parse_location
from egopatch.features.values.spec import QUANTISED, TOKEN_ARRAYS
from egopatch.features.values.tensors import torch_dtype

READ_CLIPS = 16
Groups = Mapping[str, list[str]]  # name of a file -> its clips
Origins = Mapping[str, Origin | None]


def export(
    path: Location | str,
    to: Path,
    kind: str,
    pooled: bool = False,
    by_video: bool = False,
    on_clips: OnProgress | None = None,
) -> int:
    """Write the committed clips of a store as files; `tools.feature_files` lists the layouts.

    Tokens keep their stored dtype; quantised ones are multiplied by their scale, in float32.

    Args:
        path: The store.
        to: Folder to create; it appears once it is complete.
        kind: Layout.
        pooled: Write the mean over the patches of each frame, [T, 1, D], instead of the patches.
        by_video: Join the clips of each video, in the order of their starts: [sum of T, N, D], with `timestamps` from
            the start of the file, and one CLS a clip, [clips, D].
        on_clips: Called with the number of clips done, and of all clips.

    Returns:
        The number of clips written.

    Raises:
        StoreError: `to` exists or is in the store, the store holds texts, or `by_video` is requested of clips whose
            video is not recorded or changes meanwhile; or the disk of `to` is full or cannot be written. Nothing is
            left at `to`.
    """
    if to.exists():
        raise StoreError(f"--out is {str(to)!r}, which exists; expected the name of a new folder")
    require_separate(parse_location(path), to, "--out")
    store = open_store(path)
    if store.spec.kind != "patches":
        raise StoreError(f"store {path} holds {store.spec.kind} rows; expected clips")
    origins = store.origins() if by_video else {}
    groups = _by_video(store, origins) if by_video else {name: [name] for name in store.clip_ids}
    partial = to.with_name(f".{to.name}.{uuid.uuid4().hex}")
    try:
        with write_errors_explained(f"exporting to {to}", "nothing is kept"), errors_of_temporary(partial, to):
            make_folder(partial)
            WRITERS[kind](partial, _clips(store, groups, pooled, origins, on_clips))
            rename_into_place(partial, to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sum(map(len, groups.values()))


def _clips(store: Store, groups: Groups, pooled: bool, origins: Origins, on_clips: OnProgress | None) -> Iterator[Clip]:
    """The content of each file; with `origins`, files are of videos."""
    stored = store.spec.array("patches").dtype
    dtype = torch.float32 if stored in QUANTISED else torch_dtype(stored)
    done, total = 0, sum(map(len, groups.values()))
    for name, ids in groups.items():
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(ids), READ_CLIPS):
            few = ids[start : start + READ_CLIPS]
            read = _read_with_video_times(store, few, dtype, origins) if origins else store.read_arrays(few, dtype)
            if pooled:
                read = {key: value for key, value in read.items() if "saliency" not in key and key != "positions"}
                for key in TOKEN_ARRAYS & read.keys():
                    read[key] = read[key].float().mean(dim=2, keepdim=True).to(dtype)
            parts.append(read)
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        if origins:
            yield name, {key: value if key == "cls" else value.flatten(0, 1) for key, value in joined.items()}
        else:
            yield name, {key: value[0] for key, value in joined.items()}
        done += len(ids)
        if on_clips is not None:
            on_clips(done, total)


def _read_with_video_times(store: Store, ids: list[str], dtype: torch.dtype, origins: Origins) -> dict[str, Tensor]:
    """The rows of `ids` with the times of their video, both of the same commits.

    Raises:
        StoreError: Another process has encoded a clip from a stretch of video other than that in `origins`, by which
            clips are joined.
    """

    def arrays() -> dict[str, Tensor]:
        return store.read_arrays(ids, dtype) | {"timestamps": store.video_times(ids).float()}

    read, versions = store.catalog.read_unchanged(ids, arrays)
    if moved := [name for name in ids if versions[name].origin != origins[name]]:
        raise StoreError(
            f"clip {moved[0]!r} was encoded again from another stretch of video during this export; run the same "
            "command again"
        )
    return read


def _by_video(store: Store, origins: Origins) -> Groups:
    """Name of each video, as a file can have it -> its clips, in the order of their starts."""
    if unknown := [name for name, origin in origins.items() if origin is None]:
        raise StoreError(
            f"store {store.path} does not record the video of {counted(len(unknown), 'clip')}, such as {unknown[0]!r}; "
            "use --by clip"
        )
    files = {origin.file for origin in origins.values() if origin is not None}
    # Videos outside the data set's folder are recorded by their absolute paths.
    absolute = bool(files) and all(map(os.path.isabs, files))
    folder = os.path.commonpath([Path(file).parent for file in files]) if absolute else ""
    videos: dict[str, list[tuple[float, str]]] = {}
    for name, origin in origins.items():
        assert origin is not None
        video = os.path.relpath(origin.file, folder) if absolute else origin.file
        videos.setdefault(video.replace("/", "_"), []).append((origin.start_s or 0.0, name))
    if len(videos) < len(files):
        raise StoreError(f"store {store.path} has videos whose names differ only by / and _; use --by clip")
    return {video: [name for _, name in sorted(clips)] for video, clips in sorted(videos.items())}
