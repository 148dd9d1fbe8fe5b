"""The contract of both formats in a folder, and of a store in object storage."""

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from egopatch.features import (
    AbsentClip,
    BadLocation,
    DamagedStore,
    Failure,
    Fingerprint,
    FingerprintMismatch,
    Store,
    StoreError,
    StoreSpec,
    open_store,
    torch_dataset,
)
from tests.features.conftest import FINGERPRINT, IDS, SPEC, clip, fill
from tests.features.faults import damage_row

Make = Callable[..., Store]


def test_a_store_reads_written_clips_in_any_order(make: Make) -> None:
    store = make()
    written = fill(store)
    requested = [IDS[7], IDS[0], IDS[7], IDS[9]]
    tokens = open_store(store.path).read(requested)
    assert tokens.patches.shape == (4, 2, 6, 8)
    assert tokens.patches.dtype == torch.float16
    for name, tensor in tokens.tensors().items():
        expected = torch.stack([written[clip_id][name] for clip_id in requested]).to(tensor.dtype)
        assert torch.equal(tensor, expected), name


def test_read_converts_the_tokens_only(make: Make) -> None:
    store = make()
    fill(store)
    tokens = store.read(IDS[:2], dtype=torch.bfloat16)
    assert tokens.patches.dtype == torch.bfloat16
    assert tokens.saliency.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_patches_are_stored_bit_exactly(make: Make, dtype: str) -> None:
    store = make(spec=StoreSpec.for_patches(2, (2, 3), 8, dtype, shard=4))
    written = fill(store)
    patches = store.read(IDS).patches
    assert torch.equal(patches, torch.stack([written[name]["patches"] for name in IDS]).to(patches.dtype))


def test_all_zero_features_are_features(make: Make) -> None:
    store = make()
    zeros = {array.name: torch.zeros(array.shape) for array in SPEC.arrays}
    store.write_shard(0, dict.fromkeys(IDS[:4], zeros), dict.fromkeys(IDS[:4], "sha256:0"))
    assert not store.read(IDS[:4]).patches.any()


def test_absent_clips_are_named_and_never_read_as_zeros(make: Make) -> None:
    store = make()
    store.write_shard(0, {IDS[1]: clip(1)}, {IDS[1]: "sha256:1"})
    with pytest.raises(
        AbsentClip, match=r"2 requested clips are missing from .*'vid\|P0\|0\|10', 'vid\|P9\|0\|10'"
    ) as caught:
        store.read([IDS[1], IDS[0], IDS[9]])
    assert caught.value.ids == (IDS[0], IDS[9])
    assert str(caught.value).endswith(
        "; run `extract run` to encode the missing clips, or `extract retry` for those in quarantine"
    )
    assert isinstance(caught.value, KeyError)
    assert pickle.loads(pickle.dumps(caught.value)).ids == caught.value.ids


def test_one_id_instead_of_a_list_is_refused(make: Make) -> None:
    store = make()
    with pytest.raises(TypeError, match=r"^ids is 'vid.*'; expected a list of ids, such as \['vid.*'\]$"):
        store.read(IDS[0])


def test_a_number_in_place_of_ids_is_refused(make: Make) -> None:
    with pytest.raises(TypeError, match=r"^ids is 3; expected a list of ids; clip_ids of a store lists them$"):
        make().read(3)  # type: ignore[arg-type]


def test_what_is_no_location_is_refused_in_one_line() -> None:
    with pytest.raises(BadLocation, match=r"^the location of a store is array[^\n]*; expected its folder or URL$"):
        open_store(np.zeros((2, 2)))  # type: ignore[arg-type]


def test_ids_that_are_no_text_are_refused(make: Make) -> None:
    for ids in ([IDS[0], 5], [IDS[:2]], [list(IDS[:1])]):
        with pytest.raises(
            TypeError, match=f"^ids holds {re.escape(repr(ids[-1]))}; expected ids of clips; clip_ids lists"
        ):
            make().read(ids)


def test_a_tensor_instead_of_buffers_is_refused(make: Make) -> None:
    with pytest.raises(TypeError, match=r"^out is tensor\(.*; expected buffers of this store: store.buffers\(rows\)$"):
        make().read((), out=torch.zeros(2))  # type: ignore[arg-type]


def test_a_negative_number_of_buffers_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="rows is -1; expected 0 or more"):
        make().buffers(-1)


def test_missing_shards_shrink_as_shards_are_written(make: Make) -> None:
    store = make()
    assert [(work.shard, work.ids) for work in store.missing_shards()] == [
        (0, IDS[:4]),
        (1, IDS[4:8]),
        (2, IDS[8:]),
    ]
    store.write_shard(1, {name: clip(0) for name in IDS[4:7]}, dict.fromkeys(IDS, "sha256:0"))
    assert store.clip_ids == IDS[4:7]
    assert store.missing() == (*IDS[:4], *IDS[7:])
    assert [work.ids for work in store.missing_shards()] == [IDS[:4], IDS[7:8], IDS[8:]]


def test_later_rows_of_a_shard_leave_earlier_ones_as_they_are(make: Make) -> None:
    store = make()
    fill(store, skip=(IDS[1], IDS[9]))
    before = store.read([IDS[0], IDS[8]])
    sums = dict(store.catalog.clip_records([IDS[0]])[0].checksums)
    fill(store)
    after = open_store(store.path).read([IDS[0], IDS[8]])
    assert torch.equal(before.patches, after.patches)
    assert store.catalog.clip_records([IDS[0]])[0].checksums == sums
    assert store.clip_ids == IDS


def test_an_old_reader_sees_new_rows_after_refresh(make: Make) -> None:
    writer, reader = make(), make()
    fill(writer, skip=(IDS[1],))
    reader.catalog.refresh()
    reader.read([IDS[0]])
    fill(writer)
    reader.catalog.refresh()
    assert torch.equal(reader.read([IDS[1]]).patches, writer.read([IDS[1]]).patches)


def test_quarantine_counts_attempts_and_ends_with_success(make: Make) -> None:
    store = make()
    good = {name: clip(0) for name in IDS[:3]}
    store.write_shard(0, good, dict.fromkeys(good, "sha256:0"), {IDS[3]: Failure("moov atom not found", "Traceback")})
    store.write_shard(0, {}, {}, {IDS[3]: Failure("still not", "Traceback 2")})
    record = open_store(store.path).quarantine[IDS[3]]
    assert (record.reason, record.attempts, record.traceback) == ("still not", 2, "Traceback 2")
    assert IDS[3] not in store.missing()
    assert [work.shard for work in store.missing_shards()] == [1, 2]
    assert store.missing_shards(retry_quarantined=True)[0].ids == (IDS[3],)
    store.write_shard(0, {IDS[3]: clip(3)}, {IDS[3]: "sha256:3"})
    assert store.quarantine == {}
    assert store.clip_ids == IDS[:4]


def test_growth_appends_rows(make: Make) -> None:
    store = make()
    written = fill(store)
    grown = make(ids=("new", IDS[3], "newer"))
    assert grown.planned_ids == (*IDS, "new", "newer")
    assert [(work.shard, work.ids) for work in grown.missing_shards()] == [(2, ("new", "newer"))]
    fill(grown)
    assert torch.equal(grown.read([IDS[8]]).patches[0], written[IDS[8]]["patches"].half())


def test_a_different_fingerprint_is_refused_naming_the_fields(make: Make) -> None:
    store = make()
    other = Fingerprint({**FINGERPRINT.fields, "depth": 12})
    with pytest.raises(
        FingerprintMismatch, match=r"different settings \(depth: store has 6, requested 12\); use another store.path"
    ) as caught:
        make(fingerprint=other)
    assert "frames" not in str(caught.value)
    with pytest.raises(FingerprintMismatch, match="depth: store has 6, expected 12"):
        open_store(store.path, expect=other)
    with pytest.raises(FingerprintMismatch, match=r"spec.shard: store has 4, requested 8"):
        make(spec=replace(SPEC, shard=8))


def test_nan_and_overflow_are_refused_naming_the_clip(make: Make) -> None:
    store = make()
    bad = clip(0)
    bad["saliency"][0, 0] = float("nan")
    with pytest.raises(StoreError, match=r"clip 'vid\|P0\|0\|10': saliency holds NaN or infinity"):
        store.write_shard(0, {IDS[1]: clip(1), IDS[0]: bad}, dict.fromkeys(IDS, "sha256:0"))
    big = clip(0)
    big["patches"][0, 0, 0] = 1e6
    with pytest.raises(StoreError, match="patches exceeds the range of float16"):
        store.write_shard(0, {IDS[0]: big}, dict.fromkeys(IDS, "sha256:0"))
    assert open_store(store.path).clip_ids == ()


def test_rows_known_to_be_finite_are_checked_only_if_converted(make: Make) -> None:
    store, known = make(), {IDS[0]}
    big = clip(0)
    big["patches"][0, 0, 0] = 1e6
    with pytest.raises(StoreError, match="patches exceeds the range of float16"):
        store.write_shard(0, {IDS[0]: big}, dict.fromkeys(IDS, "sha256:0"), finite=known)
    bad = clip(0)
    bad["saliency"][0, 0] = float("nan")
    with pytest.raises(StoreError, match=r"clip 'vid\|P1\|0\|10': saliency holds NaN"):
        store.write_shard(0, {IDS[1]: bad}, dict.fromkeys(IDS, "sha256:0"), finite=known)
    store.write_shard(0, {IDS[0]: bad}, dict.fromkeys(IDS, "sha256:0"), finite=known)
    assert store.read([IDS[0]]).saliency[0, 0, 0].isnan()


def test_wrong_rows_are_refused(make: Make) -> None:
    store = make()
    sources = dict.fromkeys(IDS, "sha256:0")
    with pytest.raises(StoreError, match=r"belongs to shard 1 .*; expected an id of shard 0"):
        store.write_shard(0, {IDS[5]: clip(0)}, sources)
    with pytest.raises(StoreError, match="'nobody' has no row"):
        store.write_shard(0, {"nobody": clip(0)}, sources)
    with pytest.raises(StoreError, match="no entry in sources"):
        store.write_shard(0, {IDS[0]: clip(0)}, {})
    with pytest.raises(StoreError, match=r"cls has shape \(9,\); expected \(8,\)"):
        store.write_shard(0, {IDS[0]: {**clip(0), "cls": torch.zeros(9)}}, sources)
    with pytest.raises(StoreError, match="comes with cls; expected cls, patches, saliency, timestamps"):
        store.write_shard(0, {IDS[0]: {"cls": torch.zeros(8)}}, sources)
    with pytest.raises(StoreError, match=r"cls is of type ndarray; expected a tensor: torch\.as_tensor\(cls\)$"):
        store.write_shard(0, {IDS[0]: {**clip(0), "cls": np.zeros(8, "float32")}}, sources)
    fill(store)
    with pytest.raises(StoreError, match="is already committed"):
        store.write_shard(0, {IDS[0]: clip(0)}, sources)


def test_text_states_and_masks_read_back(make: Make) -> None:
    spec = StoreSpec.for_text(length=5, width=8, shard=4)
    texts = ("what is on the table?", "../../is this a path?", "a\n?")
    store = make(ids=texts, spec=spec)
    written = fill(store)
    read = store.read_text([texts[2], texts[0]])
    assert torch.equal(read.states[0], written[texts[2]]["states"].half())
    assert torch.equal(read.attention_mask[1], written[texts[0]]["attention_mask"])
    with pytest.raises(StoreError, match="holds text rows; expected patches: use read_text"):
        store.read(texts)
    with pytest.raises(StoreError, match="holds text rows; expected patches: use read_text"):
        store.buffers(1)


def test_a_mask_of_padding_only_is_kept(make: Make) -> None:
    store = make(ids=("a", "b"), spec=StoreSpec.for_text(length=5, width=8, shard=4))
    rows = {n: {"states": torch.ones(5, 8), "attention_mask": torch.zeros(5, dtype=torch.bool)} for n in ("a", "b")}
    store.write_shard(0, rows, dict.fromkeys(rows, "sha256:0"))
    assert not store.read_text(["a", "b"]).attention_mask.any()


def test_a_store_whose_folder_is_moved_is_not_damaged(store: Store) -> None:
    store.path.rename(store.path.with_name("moved"))
    for use in (lambda: store.read(IDS), lambda: store.quarantine, store.catalog.refresh):
        with pytest.raises(StoreError, match=f"^store {store.path} does not exist any more; if it was moved, open"):
            use()


def test_a_writer_whose_store_is_moved_advises_no_repair(make_local: Callable[..., Store]) -> None:
    """It makes the folder again for its files, and a repair of that folder would find no store there."""
    store = make_local()
    with store.lease(0):
        store.path.rename(store.path.with_name("moved"))
        with pytest.raises(StoreError, match=f"^store {store.path} does not exist any more; if it was moved, open"):
            store.write_shard(0, {IDS[0]: clip(0)}, {IDS[0]: "sha256:0"})


def test_a_store_can_be_pickled(make: Make) -> None:
    store = make()
    fill(store)
    copy = pickle.loads(pickle.dumps(store))
    assert torch.equal(copy.read(IDS).patches, store.read(IDS).patches)


def test_an_open_store_stays_itself_in_another_working_directory(
    make_local: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = fill(make_local(IDS[:9]))
    monkeypatch.chdir(tmp_path)
    store = open_store("store")
    dataset = torch_dataset(store)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for reader in (store, pickle.loads(pickle.dumps(store))):  # as for a spawned worker
        assert torch.equal(reader.read(IDS[:1]).cls[0], written[IDS[0]]["cls"])
    (batch,) = DataLoader(dataset, 9, num_workers=1, collate_fn=dataset.collate, multiprocessing_context="fork")
    assert batch["clip_id"] == list(IDS[:9])
    written = fill(make_local())
    store.catalog.refresh()
    assert torch.equal(store.read(IDS[9:]).cls[0], written[IDS[9]]["cls"])
    assert store.quarantine == {}
    assert str(store.path) == "store"  # messages show it as it was given


def test_a_flipped_bit_is_never_read(store: Store) -> None:
    damage_row(store, IDS[5])
    reopened = open_store(store.path)
    with pytest.raises(DamagedStore, match=r"clip 'vid\|P5\|0\|10': the bytes of patches .*verify"):
        reopened.read([IDS[4], IDS[5]])
    assert len(reopened.read([IDS[4], IDS[6]]).cls) == 2


def test_writing_leaves_no_temporary_files_or_leases(store: Store) -> None:
    assert list((store.path / "staging").iterdir()) == []
    assert [path.name for path in (store.path / "leases").iterdir()] == ["lock"]
    assert not list(store.path.rglob("*.tmp"))


def test_a_lost_header_is_restored_only_for_the_same_settings(store: Store, make_local: Make) -> None:
    header = store.path / "store.json"
    content = header.read_bytes()
    header.unlink()
    other = Fingerprint({**FINGERPRINT.fields, "checkpoint": "sha256:2"})
    with pytest.raises(DamagedStore, match=r"line 2 committed clips whose fingerprint differs .* lost or replaced"):
        make_local(fingerprint=other)
    assert not header.exists()
    assert make_local().clip_ids == IDS
    assert header.read_bytes() == content
