"""`compare` names what was staged: the same videos, encoded with one thing changed."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from egopatch.extract.encoders import load_video_encoder, open_checkpoint
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM, Transform
from egopatch.features import Fingerprint, Store, StoreSpec, create_store
from egopatch.features.__main__ import main
from egopatch.features.tools.compare import Comparison, compare
from egopatch.features.tools.export import export

CLIPS, FRAMES, SIZE = 8, 4, 64
NAMES = tuple(f"clip{n:02d}" for n in range(CLIPS))
Row = dict[str, Tensor]
SQUEEZED = Transform("whole frame squeezed", None, None, (0.5,) * 3, (0.25,) * 3)
FIELDS = {
    "arch": "lite",
    "checkpoint": "sha256:1",
    "depth": 6,
    "path": "fused",
    "frames": FRAMES,
    "size": SIZE,
    "sampling": "uniform",
    "transform": EGOVLP_TRANSFORM.name,
    "compute_dtype": "float32",
    "stored_dtype": "float16",
}


def film(seed: int) -> np.ndarray:
    """Sixteen frames [16, 80, 120, 3]: blobs that move."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:80, :120]
    frames = np.full((16, 80, 120, 3), rng.integers(40, 200, 3), dtype=float)
    for _ in range(4):
        at, speed, colour = rng.uniform(0, 1, 2) * (80, 120), rng.normal(0, 3, 2), rng.uniform(-120, 120, 3)
        for t in range(16):
            cy, cx = at + t * speed
            frames[t] += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 300)[..., None] * colour
    return frames.clip(0, 255).astype(np.uint8)


@functools.cache
def encoded(
    first: int = 2,
    depth: int = 6,
    transform: Transform = EGOVLP_TRANSFORM,
    compute: torch.dtype = torch.float32,
    weights: float = 0.0,
) -> tuple[Row, ...]:
    """Every film's row; `weights` is how far the network's weights are from the packaged ones."""
    checkpoint = open_checkpoint("lite", None)
    if weights:
        noise = torch.Generator().manual_seed(0)
        tensors = {
            key: value * (1 + weights * torch.randn(value.shape, generator=noise)) if value.ndim == 4 else value
            for key, value in checkpoint.tensors.items()
        }
        checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    encoder = load_video_encoder("lite", checkpoint, FRAMES, depth, size=SIZE, dtype=compute)
    picked = list(range(first, 16, 4))
    rows = []
    for seed in range(CLIPS):
        tokens = encoder(to_input(film(seed)[picked], SIZE, transform)[None])
        times = torch.tensor(picked) / 15
        rows.append(
            {"patches": tokens.patches[0], "cls": tokens.cls[0], "saliency": tokens.saliency[0], "timestamps": times}
        )
    return tuple(rows)


Make = Callable[..., Store]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(
        name: str, dtype: str = "float16", shift: int = 0, fields: dict[str, object] | None = None, **how: object
    ) -> Store:
        rows = encoded(**how)  # type: ignore[arg-type]
        by_name = {clip: rows[(number - shift) % CLIPS] for number, clip in enumerate(NAMES)}
        width = rows[0]["patches"].shape[-1]
        spec = StoreSpec.for_patches(FRAMES, (4, 4), width, dtype, 8)  # type: ignore[arg-type]
        store = create_store(tmp_path / name, spec, Fingerprint({**FIELDS, **(fields or {})}), NAMES)  # type: ignore[dict-item]
        for work in store.missing_shards():
            store.write_shard(work.shard, {clip: by_name[clip] for clip in work.ids}, dict.fromkeys(work.ids, "film"))
        return store

    return made


STAGED = {
    "frames": {"first": 1, "fields": {"sampling": "first"}},
    "transform": {"transform": SQUEEZED, "fields": {"transform": SQUEEZED.name}},
    "precision": {"compute": torch.bfloat16, "fields": {"compute_dtype": "bfloat16"}},
    "depth": {"depth": 8, "fields": {"depth": 8}},
    "weights": {"weights": 0.3, "fields": {"checkpoint": "sha256:2"}},
    "shift": {"shift": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("cause", STAGED)
def test_compare_names_the_likely_cause(cause: str, make: Make) -> None:
    a, b = make("a"), make("b", **STAGED[cause])
    found = compare(a.path, b.path)
    assert not found.agree
    assert found.cause == cause, found
    assert len(found.fields) == len(STAGED[cause].get("fields", {}))  # type: ignore[arg-type]
    assert found.verdict.startswith(f"A and B differ; likely cause: {cause}, ")
    assert found.clips == found.common == CLIPS
    assert compare(b.path, a.path).cause == cause


@pytest.mark.parametrize("cause", ["depth", "weights"])
def test_another_number_of_channels_is_not_put_down_to_the_transform(cause: str, make: Make) -> None:
    fields = {"depth": {"depth": 11}, "weights": {"arch": "other", "depth": 11}}[cause]
    b = make("b", depth=11, fields={**fields, "transform": SQUEEZED.name, "size": 2 * SIZE})
    found = compare(make("a").path, b.path)
    assert found.cause == cause
    assert found.verdict.endswith(": (4, 16, 80) in A, (4, 16, 112) in B")


def test_float16_and_float32_agree_up_to_rounding(make: Make) -> None:
    found = compare(make("a").path, make("b", dtype="float32", fields={"stored_dtype": "float32"}).path)
    assert found.agree
    assert found.cause == "precision"
    assert 0 < found.error < 2**-11
    assert found.verdict == "A and B agree up to rounding in another dtype (float16 and float32)"


def test_equal_stores_agree_in_every_bit(make: Make) -> None:
    found = compare(make("a").path, make("b").path)
    assert (found.agree, found.cause, found.error, found.times_differ_s) == (True, None, 0.0, 0.0)
    assert found.cosine == pytest.approx(1)
    assert found.verdict == "A and B agree in every bit"


@pytest.mark.parametrize(("cause", "seen"), [("shift", "shift"), ("frames", "frames"), ("depth", "unknown")])
def test_compare_infers_causes_from_values_without_fingerprints(
    cause: str, seen: str, make: Make, tmp_path: Path
) -> None:
    """Files have no fingerprint: a shift of the clips shows in the values, other frames in their timestamps."""
    a, b = make("a"), make("b", **STAGED[cause])
    export(b.path, tmp_path / "files", "pt")
    assert compare(a.path, tmp_path / "files").cause == seen


@pytest.mark.parametrize("kind", ["npy", "pt", "hdf5"])
def test_a_store_and_its_exported_files_agree(kind: str, make: Make, tmp_path: Path) -> None:
    a = make("a")
    export(a.path, tmp_path / "files", kind)
    assert compare(a.path, tmp_path / "files").cause is None
    export(a.path, tmp_path / "pooled", kind, pooled=True)
    assert compare(a.path, tmp_path / "pooled").agree


def test_per_frame_features_agree_with_their_mean_over_frames(tmp_path: Path) -> None:
    whole, mean = tmp_path / "whole", tmp_path / "mean"
    whole.mkdir()
    mean.mkdir()
    for number, name in enumerate(NAMES):
        patches = np.random.default_rng(number).normal(size=(8, 4, 6)).astype(np.float32)  # [T, N, D]
        np.save(whole / f"{name}.npy", patches)
        np.save(mean / f"{name}.npy", patches.mean(axis=0, keepdims=True))
    assert compare(whole, mean).agree
    assert compare(mean, whole).agree


def test_compare_names_scale_frame_shift_worst_tokens_and_shape(make: Make, tmp_path: Path) -> None:
    a, folder = make("a"), tmp_path / "files"
    folder.mkdir()

    def compared_with(change: Callable[[np.ndarray], np.ndarray]) -> Comparison:
        for name in NAMES:
            np.save(folder / f"{name}.npy", change(a.read([name], torch.float32).patches[0].numpy()))
        return compare(a.path, folder)

    def louder(patches: np.ndarray) -> np.ndarray:
        patches[2, 3, :5] += 10
        return patches

    assert compared_with(lambda patches: patches * 3).cause == "scale"
    found = compared_with(lambda patches: np.roll(patches, 1, axis=0))
    assert (found.cause, found.verdict.partition(": frame t")[2]) == ("frames", " of A is frame t + 1 of B")
    found = compared_with(louder)
    assert found.worst_tokens[0].name == "frame 2 patch 3"
    assert {measure.name for measure in found.worst_channels} <= {f"channel {d}" for d in range(5)}
    assert compared_with(lambda patches: np.zeros((2, 16, 7), np.float32)).cause == "shape"


def test_compare_command_prints_verdict_json_and_errors(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = make("a"), make("b", **STAGED["depth"])
    assert main(["compare", str(a.path), str(a.path)]) == 0
    assert capsys.readouterr().out.startswith("A and B agree in every bit\n")
    assert main(["compare", str(a.path), str(b.path), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["agree"], said["cause"]) == (False, "depth")
    assert said["fields"] == ["depth: A has 6, B has 8"]
    assert len(said["worst_clips"]) == 3
    assert main(["compare", str(a.path), str(tmp_path / "nothing")]) == 2
    assert "B is '" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["compare", str(a.path), str(tmp_path / "empty")]) == 1
    assert "holds no features; expected one file per clip" in capsys.readouterr().err
    spec = StoreSpec.for_patches(2, (2, 2), 8)
    unfilled = create_store(tmp_path / "unfilled", spec, Fingerprint({}), NAMES)
    assert main(["compare", str(a.path), str(unfilled.path)]) == 1
    said = capsys.readouterr().err
    assert f"store {unfilled.path} holds no clip yet; expected encoded clips: run `extract run` first" in said
    assert said.count("\n") == 1
    (tmp_path / "others").mkdir()
    np.save(tmp_path / "others" / "x.npy", np.ones(3, np.float32))
    assert main(["compare", str(a.path), str(tmp_path / "others")]) == 1
    assert "have no clip in common: A has 'clip00', B has 'x'; expected the same ids" in capsys.readouterr().err


def files_of(folder: Path, *clips: np.ndarray) -> Path:
    folder.mkdir()
    for number, patches in enumerate(clips):
        np.save(folder / f"{number}.npy", patches)
    return folder


@pytest.mark.parametrize(
    ("clips", "why"),
    [
        (
            [np.ones((2, 4, 8)), np.ones((3, 4, 8))],
            r"clip '1' has patches of shape (3, 4, 8) in A and B, but other clips",
        ),
        ([np.ones((1, 1, 2, 4, 8))], "clip '0': patches have shape (1, 1, 2, 4, 8); expected [T, N, D]"),
        ([np.ones((2, 0, 8))], "clip '0': patches have shape (2, 0, 8); expected at least one value"),
        ([np.full((2, 4, 8), np.nan)], "clip '0': patches hold NaN or infinity"),
    ],
)
def test_features_that_cannot_be_compared_give_a_one_line_error(
    clips: list[np.ndarray], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = files_of(tmp_path / "a", *clips), files_of(tmp_path / "b", *clips)
    assert main(["compare", str(a), str(b)]) == 1
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_a_timestamp_that_is_not_a_number_differs(tmp_path: Path) -> None:
    for name, times in (("a", [0.0, 0.5]), ("b", [0.0, float("nan")])):
        (tmp_path / name).mkdir()
        torch.save({"patches": torch.ones(2, 4, 8), "timestamps": torch.tensor(times)}, tmp_path / name / "clip.pt")
    assert compare(tmp_path / "a", tmp_path / "b").times_differ_s == float("inf")


def test_timestamps_of_any_dtype_are_compared(tmp_path: Path) -> None:
    for name, times in (("a", torch.tensor([0, 1])), ("b", torch.tensor([0.0, 1.5]))):
        (tmp_path / name).mkdir()
        torch.save({"patches": torch.ones(2, 4, 8), "timestamps": times > 0}, tmp_path / name / "clip.pt")
    assert compare(tmp_path / "a", tmp_path / "b").times_differ_s == 0


def test_json_of_an_infinite_error_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, value, channels in (("a", 1, 8), ("zeros", 0, 8), ("narrow", 1, 4)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "clip.npy", np.full((2, 4, channels), value, np.float32))
    for other in ("zeros", "narrow"):
        assert main(["compare", str(tmp_path / "a"), str(tmp_path / other), "--json"]) == 1
        result = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert result["error"] is None
