"""Items and batches equal `Store.read` in any kind of worker, and memory in use is never overwritten."""

import gc
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from egopatch.features import (
    AbsentClip,
    DamagedStore,
    Store,
    StoreError,
    StoreSpec,
    create_store,
    open_store,
    torch_dataset,
)
from egopatch.features.state.ledger import raw_ledger_journal
from egopatch.features.state.origin import Origin
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip, fill
from tests.features.faults import before_a_shard_is_opened, damage_row


def check(store: Store, batch: dict[str, Any], dtype: torch.dtype | None = None) -> None:
    expected = store.read(batch["clip_id"], dtype).tensors()
    assert batch.keys() == {"clip_id", *expected}
    for name, tensor in expected.items():
        assert batch[name].dtype == tensor.dtype
        assert torch.equal(batch[name], tensor), name


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_items_and_batches_equal_store_reads_without_workers(store: Store, dtype: torch.dtype | None) -> None:
    clips = torch_dataset(store, dtype=dtype)
    assert len(clips) == len(IDS)
    assert clips[3]["clip_id"] == IDS[3]
    assert torch.equal(clips[3]["patches"], store.read([IDS[3]], dtype).patches[0])
    for loader in (DataLoader(clips, 4, collate_fn=clips.collate), DataLoader(clips, 4)):
        batches = list(loader)
        assert [name for batch in batches for name in batch["clip_id"]] == list(IDS)
        for batch in batches:
            check(store, batch, dtype)
    first, second = clips.__getitems__([7, 2])
    assert (first["clip_id"], second["clip_id"]) == (IDS[7], IDS[2])


def test_a_batch_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, asked = torch_dataset(store), list[str]()
    read = clips.read
    monkeypatch.setattr(clips, "read", lambda ids: asked.extend(ids) or read(ids))
    for loader in (DataLoader(clips, 4, collate_fn=clips.collate), DataLoader(clips, 4)):
        asked.clear()
        assert len(list(loader)) > 1
        assert asked == list(IDS)


def test_a_dataset_takes_a_subset_of_clips_in_the_given_order(store: Store) -> None:
    clips = torch_dataset(store, IDS[5:2:-1])
    assert clips.clip_ids == IDS[5:2:-1]
    with pytest.raises(AbsentClip, match="nothing"):
        torch_dataset(store, ["nothing"])
    assert torch_dataset(store, iter(IDS[:3])).clip_ids == IDS[:3]  # not empty after the check has read them
    assert torch_dataset(store, np.array(IDS[:3])).clip_ids == IDS[:3]
    with pytest.raises(TypeError, match=r"^store is 'runs/store'; expected an open store: open_store\(path\)$"):
        torch_dataset("runs/store")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a list of ids"):
        torch_dataset(store, "abc")


def test_a_quantised_store_is_batched_raw_or_dequantised(tmp_path: Path) -> None:
    spec = StoreSpec.for_patches(2, (2, 3), 8, "int8", 4)
    store = create_store(tmp_path / "store", spec, FINGERPRINT, IDS)
    for work in store.missing_shards():
        rows = {name: clip(n, spec) for n, name in enumerate(work.ids)}
        for row in rows.values():
            row.pop("scale")  # the store computes it
        store.write_shard(work.shard, rows, dict.fromkeys(rows, "sha"))
    check(store, next(iter(DataLoader(torch_dataset(store), 4))))
    clips = torch_dataset(store, dtype=torch.float16)
    batch = next(iter(DataLoader(clips, 4, num_workers=1, collate_fn=clips.collate, multiprocessing_context="fork")))
    assert "scale" not in batch
    check(store, batch, torch.float16)
    float8 = store.read(IDS, torch.float8_e4m3fn).patches
    assert torch.equal(float8.float(), store.read(IDS, torch.float32).patches.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_forked_workers_never_overwrite_memory_in_use(store: Store, dtype: torch.dtype | None) -> None:
    clips = torch_dataset(store, dtype=dtype)
    store.read(IDS)  # the parent has open files and locks
    loader = DataLoader(
        clips, 3, shuffle=True, num_workers=2, collate_fn=clips.collate, multiprocessing_context="fork",
        persistent_workers=True,
    )  # fmt: skip
    kept, copies, places = [], [], set()
    for epoch in range(6):
        seen = []
        for number, batch in enumerate(loader):
            check(store, batch, dtype)
            seen += batch["clip_id"]
            places.add(batch["cls"].data_ptr())
            if number == epoch % 4:  # only one small tensor of all that share the same memory
                kept.append(batch["cls"][1:])
                copies.append(batch["cls"][1:].clone())
        assert sorted(seen) == sorted(IDS)
    assert all(torch.equal(tensor, copied) for tensor, copied in zip(kept, copies, strict=True))
    assert len(places) < 6 * 4  # else nothing was used again
    assert sum(int(memory[0]) for memory in clips._mapped.values()) >= 6  # in use
    del batch, kept, loader
    gc.collect()
    assert not any(memory[0] for memory in clips._mapped.values())


def test_a_forked_process_that_ends_does_not_free_memory_in_use(store: Store) -> None:
    clips = torch_dataset(store)
    loader = iter(DataLoader(clips, 1, num_workers=1, collate_fn=clips.collate, multiprocessing_context="fork"))
    batch = next(loader)
    if (child := os.fork()) == 0:
        del batch  # as a process that ends normally does
        os._exit(0)
    os.waitpid(child, 0)
    for later in loader:
        check(store, later)
    check(store, batch)


def test_a_loader_without_batches_is_refused_by_collate(store: Store) -> None:
    clips = torch_dataset(store)
    with pytest.raises(TypeError, match=r"^collate was given one item; expected a list: set the DataLoader's batch"):
        next(iter(DataLoader(clips, batch_size=None, collate_fn=clips.collate)))


@pytest.mark.parametrize("given", [5, None, [], "abc", [5], [None], torch.zeros(2)])
def test_collate_refuses_what_is_no_list_of_items(given: Any, store: Store) -> None:
    with pytest.raises(TypeError, match=r"^collate was given .*; expected a list of items of this dataset$"):
        torch_dataset(store).collate(given)


@pytest.mark.parametrize("index", ["x", None, 1.5, slice(0, 2)])
def test_an_index_that_is_no_number_is_refused(index: Any, store: Store) -> None:
    with pytest.raises(TypeError, match=r"^index is .*; expected a number; clip_ids lists the clips in order$"):
        torch_dataset(store)[index]


def test_an_index_out_of_range_is_refused_with_the_number_of_clips(store: Store) -> None:
    clips = torch_dataset(store, IDS[:3])
    assert [clip["clip_id"] for clip in clips] == list(IDS[:3])  # type: ignore[attr-defined]
    assert clips[-1]["clip_id"] == IDS[2]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"^index is {index}; this dataset has 3 clips$"):
            clips[index]


def test_a_dtype_in_place_of_ids_is_refused(store: Store) -> None:
    with pytest.raises(TypeError, match=r"^ids is torch\.float32; expected a list of ids"):
        torch_dataset(store, torch.float32)  # type: ignore[arg-type]


def test_a_wrong_dtype_is_quoted_in_short(store: Store) -> None:
    with pytest.raises(ValueError, match=r"^dtype is .{1,60}; expected a floating-point dtype of torch"):
        store.read(torch.float16, IDS * 100)  # type: ignore[arg-type]


def test_buffers_for_no_number_of_clips_are_refused(store: Store) -> None:
    with pytest.raises(TypeError, match=r"^rows is '3'; expected a number of clips$"):
        store.buffers("3")  # type: ignore[arg-type]


def test_memory_of_exited_workers_is_released(store: Store) -> None:
    clips = torch_dataset(store)
    for _ in range(3):
        for batch in DataLoader(clips, 3, num_workers=1, collate_fn=clips.collate, multiprocessing_context="fork"):
            check(store, batch)
    assert len({worker for worker, _ in clips._mapped}) <= 2


def test_a_damaged_clip_raises_in_the_training_process(store: Store) -> None:
    damage_row(store, IDS[4])
    clips = torch_dataset(store)
    loader = DataLoader(clips, 2, num_workers=1, collate_fn=clips.collate, multiprocessing_context="fork")
    with pytest.raises(DamagedStore, match="bytes of"):
        list(loader)


def test_to_numpy_equals_read(store: Store) -> None:
    arrays = store.to_numpy(IDS[:3])
    expected = store.read(IDS[:3], torch.float32).tensors()
    assert arrays.keys() == expected.keys()
    assert all(np.array_equal(arrays[name], tensor.numpy()) for name, tensor in expected.items())
    assert store.to_numpy(IDS[:3], torch.float16)["patches"].dtype == np.float16
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16; expected one that NumPy has"):
        store.to_numpy(IDS[:3], torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, torch.bool, torch.complex64])
def test_a_dtype_that_cannot_hold_tokens_is_refused(dtype: Any, store: Store) -> None:
    for read in (store.read, store.read_arrays, partial(torch_dataset, store)):
        with pytest.raises(ValueError, match=r"dtype is .*; expected a floating-point dtype of torch"):
            read(IDS[:3], dtype)


def test_video_times_add_the_start_of_each_clip(tmp_path: Path) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS[:4])
    rows = {name: clip(n) | {"timestamps": torch.tensor([0.5, 1.5])} for n, name in enumerate(IDS[:4])}
    origins = {
        IDS[0]: Origin("a.mp4", 1, 12.0, 20.0),
        IDS[1]: Origin("a.mp4", 1),
        IDS[2]: Origin("a.mp4", 1, 0.25, 2.0),
    }
    store.write_shard(0, rows, dict.fromkeys(rows, "sha"), origins=origins)
    times = store.video_times(IDS[2::-1])
    assert times.tolist() == [[0.75, 1.75], [0.5, 1.5], [12.5, 13.5]]
    with pytest.raises(StoreError, match="does not record start and end of 1 clip,"):
        store.video_times(IDS[:4])
    with pytest.raises(AbsentClip, match="1 requested clip is missing"):
        store.video_times(["nobody"])


@pytest.mark.parametrize("removed", [False, True])
def test_video_times_belong_to_one_commit(removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS[:8])

    def write(second: float, *ids: str) -> None:
        writer = open_store(store.path)
        for work in writer.missing_shards(replace=ids):
            rows = {name: clip(int(second)) | {"timestamps": torch.full((2,), second)} for name in work.ids}
            origins = dict.fromkeys(rows, Origin("a.mp4", 1, 10 * second))
            writer.write_shard(work.shard, rows, dict.fromkeys(rows, str(second)), {}, origins, work.replaces)

    def change() -> None:
        write(3.0, IDS[4], IDS[0])
        if removed:
            open_store(store.path).rewrite_shard(0, without=[IDS[0]])

    write(1.0, *IDS[:8])
    store = open_store(store.path)
    before_a_shard_is_opened(monkeypatch, 1, change)
    with pytest.raises(AbsentClip, match="1 requested clip is missing") if removed else nullcontext():
        assert store.video_times([IDS[0], IDS[4]]).tolist() == [[33.0, 33.0]] * 2


def test_video_times_read_only_timestamps_of_the_requested_clips(tmp_path: Path) -> None:
    """An export reads the times of a few clips at a time: what is damaged elsewhere does not matter."""
    store = create_store(tmp_path / "store", SPEC, FINGERPRINT, IDS[:8])
    for first in (0, 4):
        rows = {name: clip(n) for n, name in enumerate(IDS[first : first + 4])}
        origins = dict.fromkeys(rows, Origin("a.mp4", 1, 2.0, 4.0))
        store.write_shard(first // 4, rows, dict.fromkeys(rows, "sha"), origins=origins)
    damage_row(store, IDS[0])
    journal = raw_ledger_journal(store.catalog.storage)
    *others, last = [line.entry for line in journal.read().lines]
    journal.rewrite(lambda _: [*others, last | {"origins": "damaged"}])
    store = open_store(store.path)
    assert store.video_times(IDS[:2]).shape == (2, 2)
    with pytest.raises(DamagedStore, match="'origins' of a commit is"):
        store.video_times(IDS[4:6])


@pytest.mark.slow
def test_a_store_in_a_bucket_is_read_by_spawned_workers_and_refuses_forked_ones(bucket: str) -> None:
    store = create_store(f"{bucket}/store", SPEC, FINGERPRINT, IDS)
    fill(store)
    clips = torch_dataset(store)
    loader = partial(DataLoader, clips, 4, num_workers=1, collate_fn=clips.collate, timeout=60)
    batches = list(loader(multiprocessing_context="spawn"))  # all are held at once
    assert [name for batch in batches for name in batch["clip_id"]] == list(IDS)
    for batch in batches:
        check(store, batch)
    with pytest.raises(StoreError, match=r"/store cannot be used in a forked process: requests would hang.*'spawn'"):
        next(iter(loader(multiprocessing_context="fork")))
