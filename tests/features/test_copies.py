"""`convert` and `derive`: values stay the same, and changes of values are in the fingerprint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from egopatch.features import (
    AbsentClip,
    Failure,
    Fingerprint,
    FingerprintMismatch,
    Store,
    StoreError,
    StoreSpec,
    create_store,
    open_store,
)
from egopatch.features.__main__ import main
from egopatch.features.state.header import StoreHeader
from egopatch.features.tools.convert import convert
from egopatch.features.tools.derive import derive
from egopatch.features.tools.verify import verify
from egopatch.features.values.spec import ArraySpec
from tests.features.conftest import FINGERPRINT, FORMATS, IDS, clip, fill
from tests.features.faults import before_a_shard_is_opened, replace_rows
from tests.features.test_verify import TEXT_SPEC, TEXTS

BAD = IDS[2]


@pytest.fixture(params=FORMATS)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    spec = StoreSpec.for_patches(2, (2, 3), 16, "float16", shard=4)
    fingerprint = Fingerprint({**FINGERPRINT.fields, "stored_dtype": "float16"})
    store = create_store(tmp_path / "store", spec, fingerprint, IDS, request.param)
    store.write_shard(0, {}, {}, {BAD: Failure("broken", "Traceback")})
    fill(store)
    fill(create_store(tmp_path / "store" / "text", TEXT_SPEC, fingerprint, TEXTS, request.param))
    return open_store(store.path)


@pytest.mark.parametrize("format", FORMATS)
def test_converting_format_and_shard_size_keeps_every_bit(whole: Store, tmp_path: Path, format: str) -> None:
    copy = convert(whole.path, tmp_path / "copy", format=format, shard=3)
    assert (copy.format, copy.spec.shard) == (format, 3)
    assert copy.fingerprint == whole.fingerprint
    assert copy.clip_ids == whole.clip_ids == tuple(name for name in IDS if name != BAD)
    assert copy.quarantine[BAD].reason == "broken"
    for name, tensor in whole.read(whole.clip_ids).tensors().items():
        assert torch.equal(copy.read(whole.clip_ids).tensors()[name], tensor), name
    assert copy.sources([IDS[0]]) == whole.sources([IDS[0]])
    text, text_copy = open_store(whole.path / "text"), open_store(copy.path / "text")
    assert torch.equal(text_copy.read_text(TEXTS).states, text.read_text(TEXTS).states)
    assert verify(copy.path).ok


def test_convert_progress_counts_clips_without_relisting_them_per_shard(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Store] = []

    def counted(store: Store) -> tuple[str, ...]:
        listed.append(store)
        return tuple(name for name in store.catalog.rows if name in store.catalog.ledger.clips)

    monkeypatch.setattr(Store, "clip_ids", property(counted))
    seen: list[tuple[int, int]] = []
    calls = []
    for shard in (1, 5):
        seen.clear()
        listed.clear()
        convert(whole.path, tmp_path / f"by {shard}", shard=shard, on_clips=lambda *counts: seen.append(counts))
        assert seen == sorted(seen)
        assert seen[-1] == (9, 9)
        calls.append(len(listed))
    assert calls[0] == calls[1]  # listing all clips after each shard would take quadratic time


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3"])
def test_converting_the_dtype_changes_the_fingerprint(whole: Store, tmp_path: Path, dtype: str) -> None:
    copy = convert(whole.path, tmp_path / "copy", dtype=dtype)
    assert copy.fingerprint.fields["stored_dtype"] == dtype
    assert copy.fingerprint.fields["converted_from"] == "float16"
    given = whole.read(IDS[:2], dtype=torch.float32).patches
    read = copy.read(IDS[:2], dtype=torch.float32).patches
    assert torch.allclose(read, given, atol=0.2, rtol=0.07)
    assert torch.equal(read, given) == (dtype == "float32")
    assert bool(copy.reconstruction_error) == (dtype in ("int8", "float8_e4m3"))
    assert verify(copy.path).ok
    again = convert(copy.path, tmp_path / "back", dtype="float32")
    assert torch.equal(again.read(IDS[:2]).patches, read)


@pytest.mark.parametrize(("format", "codec"), [("zarr", "zstd"), ("zarr", "blosc-zstd"), ("hdf5", "gzip")])
def test_a_codec_changes_no_value_and_no_fingerprint(whole: Store, tmp_path: Path, format: str, codec: str) -> None:
    copy = convert(whole.path, tmp_path / "copy", format=format, codec=codec)
    assert copy.fingerprint == whole.fingerprint
    assert (copy.spec.codec, open_store(copy.path / "text").spec.codec) == (codec, codec)
    ids = whole.clip_ids
    assert torch.equal(copy.read(ids, out=copy.buffers(9), threads=3).patches, whole.read(ids).patches)
    assert copy.catalog.clip_records(ids) == whole.catalog.clip_records(ids)
    assert verify(copy.path).ok
    small = derive(copy.path, tmp_path / "small", keep=0.5)
    assert small.spec.codec == codec
    back = convert(copy.path, tmp_path / "back", format=whole.format, codec="none")
    name = next(iter(whole.catalog.ledger.commits[1].files))
    assert (back.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_a_codec_of_the_other_format_is_refused(
    whole: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsupported = {"zarr": "gzip", "hdf5": "zstd"}[whole.format]
    with pytest.raises(StoreError, match=f"codec is '{unsupported}'; expected one of {whole.format}'s codecs: none, "):
        convert(whole.path, tmp_path / "copy", codec=unsupported)  # type: ignore[arg-type]
    assert not (tmp_path / "copy").exists()
    fitting = {"zarr": "zstd", "hdf5": "gzip"}[whole.format]
    assert main(["convert", str(whole.path), "--codec", fitting, "--json"]) == 0
    assert f'"codec": "{fitting}"' in capsys.readouterr().out
    with pytest.raises(FingerprintMismatch, match=f"spec.codec: store has '{fitting}', requested 'none'"):
        convert(whole.path, whole.path.with_name(f"store_{fitting}"))


def test_options_that_conflict_with_the_stores_exit_with_code_2(
    whole: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = ["convert", str(whole.path), "--to", str(tmp_path / "copy")]
    assert main([*copy, "--dtype", "int8"]) == 0
    capsys.readouterr()
    assert main([*copy, "--dtype", "float32"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "(stored_dtype: store has 'int8', requested 'float32'; patches: store has int8, requested float32; " in line
    assert "; scale: store has float32 [2, 6], requested no such array); use another --to or the original sett" in line
    assert "{" not in line
    other, codec = {"zarr": ("hdf5", "zstd"), "hdf5": ("zarr", "gzip")}[whole.format]
    assert main(["convert", str(whole.path), "--format", other, "--codec", codec]) == 2
    assert (
        f"features convert: error: --codec is '{codec}'; expected one of {other}'s codecs: none, "
        in capsys.readouterr().err
    )
    assert main(["convert", str(whole.path), "--codec", codec]) == 0
    capsys.readouterr()
    assert main(["convert", str(whole.path.with_name(f"store_{codec}")), "--format", other, "--json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"features convert: error: --codec is not given, and the store's codec is '{codec}'; expected one of {other}'s"
    )


def test_arrays_that_differ_are_named_one_by_one(whole: Store) -> None:
    def differences(*arrays: ArraySpec) -> list[str]:
        other = StoreHeader(replace(whole.spec, arrays=arrays), whole.fingerprint, whole.format)
        return StoreHeader(whole.spec, whole.fingerprint, whole.format).differences(other)

    first, *others = whole.spec.arrays
    assert differences(first, *others) == []
    cls, *narrow = others
    assert differences(replace(first, shape=(*first.shape[:2], 99)), replace(cls, shape=(99,)), *narrow) == [
        f"patches: store has float16 {list(first.shape)}, requested float16 {[*first.shape[:2], 99]}",
        "cls: store has float32 [16], requested float32 [99]",
    ]
    (line,) = differences(*others, first)
    assert line.startswith(f"order of the arrays: store has {first.name}, ")


def test_an_interrupted_conversion_resumes(whole: Store, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 9
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(whole.path, tmp_path / "copy", on_clips=stop)
    assert 0 < len(open_store(tmp_path / "copy").clip_ids) < 9
    assert convert(whole.path, tmp_path / "copy").clip_ids == whole.clip_ids
    with pytest.raises(FingerprintMismatch, match="stored_dtype: store has 'float16', requested 'bfloat16'"):
        convert(whole.path, tmp_path / "copy", dtype="bfloat16")


def test_a_clip_that_left_quarantine_since_the_first_copy_is_copied(whole: Store, tmp_path: Path) -> None:
    """A second copy to the same place left it in quarantine, and so lacked it without a word."""
    whole.write_shard(
        1, {}, {}, {IDS[5]: Failure("broken", "Traceback")}, replaces=whole.catalog.ledger.versions([IDS[5]])
    )
    convert(whole.path, tmp_path / "copy")
    derive(whole.path, tmp_path / "small", keep=0.5)
    whole.write_shard(0, {BAD: clip(2, whole.spec)}, {BAD: "sha256:retried"})
    steps: list[tuple[int, int]] = []
    copies = [
        convert(whole.path, tmp_path / "copy", on_clips=lambda *counts: steps.append(counts)),
        derive(whole.path, tmp_path / "small", keep=0.5),
    ]
    for copy in copies:
        assert copy.clip_ids == tuple(name for name in IDS if name != IDS[5])
        assert {name: record.attempts for name, record in copy.quarantine.items()} == {IDS[5]: 1}
        assert copy.sources([BAD]) == {BAD: "sha256:retried"}
    assert steps == [(9, 9)]


def test_rows_replaced_while_they_are_copied_keep_their_own_source(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = whole.read([IDS[0]]).patches[0]
    before_a_shard_is_opened(monkeypatch, 1, lambda: replace_rows(open_store(whole.path), 90, IDS[0], IDS[4]))
    copy = convert(whole.path, tmp_path / "copy", shard=8)
    for name in (IDS[0], IDS[4]):
        row = copy.read([name]).patches[0]
        assert torch.equal(row, former) == (copy.sources([name])[name] != "new"), name


def test_a_clip_removed_while_it_is_copied_is_named(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove() -> None:
        other = open_store(whole.path)
        other.rewrite_shard(0, without=[IDS[0]])
        replace_rows(other, 90, IDS[4])

    before_a_shard_is_opened(monkeypatch, 1, remove)
    with pytest.raises(AbsentClip, match="1 requested clip is missing"):
        convert(whole.path, tmp_path / "copy", shard=8)
    assert set(convert(whole.path, tmp_path / "copy", shard=8).clip_ids) == {*IDS[1:]} - {BAD}


def test_a_copy_inside_the_store_is_refused(whole: Store) -> None:
    with pytest.raises(StoreError, match="inside the store"):
        convert(whole.path, whole.path / "copy")
    with pytest.raises(StoreError, match="expected one outside it"):
        derive(whole.path, whole.path, keep=0.5)


def test_an_empty_destination_does_not_write_to_the_current_folder(
    whole: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in ["convert"], ["derive", "--keep", "0.5"]:
        with pytest.raises(SystemExit, match="2"):
            main([*command, str(whole.path), "--to", ""])
        assert "argument --to: it is empty; expected a folder or a URL" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_values_out_of_the_dtype_range_name_their_clip(tmp_path: Path) -> None:
    spec = StoreSpec.for_patches(2, (2, 3), 8, "float32", shard=4)
    store = create_store(tmp_path / "store", spec, FINGERPRINT, IDS[:2])
    big = clip(1)
    big["patches"][0, 0, 0] = 1e6
    store.write_shard(0, {IDS[0]: clip(0), IDS[1]: big}, dict.fromkeys(IDS, "x"))
    with pytest.raises(StoreError, match=r"clip 'vid\|P1\|0\|10': patches exceeds the range of float16"):
        convert(store.path, tmp_path / "copy", dtype="float16")


def test_derived_patches_are_the_most_salient(whole: Store, tmp_path: Path) -> None:
    small = derive(whole.path, tmp_path / "small", keep=0.34)
    full, kept = whole.read(IDS[3:6]), small.read(IDS[3:6])
    assert kept.patches.shape == (3, 2, 3, 16)  # ceil(0.34 x 6) = 3 of 6
    assert small.spec.grid == (2, 3)
    assert kept.positions is not None
    for b in range(3):
        for t in range(2):
            ranked = sorted(range(6), key=lambda n: (-float(full.saliency[b, t, n]), n))[:3]
            assert kept.positions[b, t].tolist() == ranked
            assert torch.equal(kept.patches[b, t], full.patches[b, t, ranked])
            assert torch.equal(kept.saliency[b, t], full.saliency[b, t, ranked])
    assert torch.equal(kept.cls, full.cls)
    assert small.fingerprint.fields["parent"] == whole.fingerprint.digest
    assert small.fingerprint.fields["derived_keep"] == 0.34
    assert small.quarantine.keys() == {BAD}
    assert open_store(small.path / "text").clip_ids == TEXTS
    assert small.nbytes < 0.75 * whole.nbytes or small.format == "hdf5"
    assert verify(small.path).ok


def test_saliency_ties_keep_the_lowest_patch_indices(tmp_path: Path) -> None:
    spec = StoreSpec.for_patches(1, (2, 3), 8, "int8", shard=4)
    store = create_store(tmp_path / "store", spec, FINGERPRINT, IDS[:1])
    row = {**clip(0, spec), "saliency": torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]])}
    del row["scale"]
    store.write_shard(0, {IDS[0]: row}, {IDS[0]: "x"})
    kept = derive(store.path, tmp_path / "small", keep=0.6).read([IDS[0]])
    full = store.read([IDS[0]])
    assert kept.positions is not None
    assert kept.positions[0, 0].tolist() == [1, 3, 0, 2]
    assert kept.scale is not None
    assert full.scale is not None
    assert torch.equal(kept.patches[0, 0], full.patches[0, 0, [1, 3, 0, 2]])
    assert torch.equal(kept.scale[0, 0], full.scale[0, 0, [1, 3, 0, 2]])


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5])
def test_a_keep_share_out_of_range_is_refused(whole: Store, tmp_path: Path, keep: float) -> None:
    with pytest.raises(StoreError, match=rf"--keep is {keep}; expected a share above 0 and at most 1"):
        derive(whole.path, tmp_path / "small", keep=keep)


def test_deriving_twice_is_refused(whole: Store, tmp_path: Path) -> None:
    small = derive(whole.path, tmp_path / "small", keep=0.5)
    with pytest.raises(StoreError, match="is derived already; expected a full store of clips"):
        derive(small.path, tmp_path / "smaller", keep=0.5)


def test_convert_and_derive_commands_write_copies(whole: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(whole.path), "--format", "hdf5", "--dtype", "int8"]) == 0
    out = capsys.readouterr().out
    assert "store_hdf5_int8: 9 clips" in out
    assert "patches: reconstruction error 0." in out
    assert main(["derive", str(whole.path), "--keep", "0.25", "--by", "saliency", "--json"]) == 0
    assert '"derived_keep": 0.25' in capsys.readouterr().out
    assert open_store(whole.path.with_name("store_keep0.25")).spec.array("patches").shape == (2, 2, 16)


def test_a_copy_may_be_in_a_folder_named_after_a_format(
    whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(whole.path), "--to", "hdf5", "--format", whole.format]) == 0
    assert main(["convert", str(whole.path), "--to", "hdf5"]) == 0  # resumes
    assert open_store(tmp_path / "hdf5").format == whole.format


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["derive", "x", "--keep", "7"], "argument --keep: 7 is out of range; expected a number above 0 and at most 1"),
        (["derive", "x", "--keep", "few"], "argument --keep: few is out of range; expected a number above 0"),
        (["convert", "x", "--shard", "many"], "argument --shard: many is out of range; expected at least 1 clip"),
        (
            ["convert", "x", "--to", "hdf5"],
            "--to is 'hdf5', a format; expected the folder of the copy: use --format hdf5",
        ),
        (["export", "x", "--to", "npz"], "argument --to: invalid choice: 'npz' (choose from 'npy', 'pt',"),
    ],
)
def test_usage_errors_print_one_line(args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(args)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"features {args[0]}: error: {expected}")
