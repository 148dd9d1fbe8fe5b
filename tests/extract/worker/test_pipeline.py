"""Decoding, encoding and writing overlap, with a fake decoder, a fake encoder and a controlled disk."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from egopatch.configs.schema import Config, EncoderConfig, EngineConfig, StoreConfig, VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.pool import UndecodedClip
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM
from egopatch.extract.worker import pipeline
from egopatch.extract.worker.job_stats import JobStats, Stages
from egopatch.extract.worker.on_cores import CoreEncoder
from egopatch.extract.worker.pipeline import encode_shards
from egopatch.extract.writing.shard_writer import BackgroundShardWriter, EncodedShard, TooManyErrors, shards_at_once
from egopatch.features import (
    Fingerprint,
    PatchTokens,
    ShardOwned,
    Store,
    StoreError,
    StoreSpec,
    create_store,
    open_store,
)
from egopatch.features.io import file_lease as lease

SPEC = StoreSpec.for_patches(frames=2, grid=(1, 1), width=2, dtype="float32", shard=2)
IDS = tuple(f"clip{number}" for number in range(12))
BATCH = 2


class Encoder(nn.Module):
    """Gives each clip tokens of its first pixel, and those in `not_finite` NaN in an array; remembers the shapes."""

    steps = 2

    def __init__(self, not_finite: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__()
        self.not_finite = {IDS.index(name): array for name, array in not_finite.items()}
        self.weight = nn.Parameter(torch.ones(()))
        self.shapes: list[tuple[int, ...]] = []

    def pack(self) -> None:
        pass

    def forward(self, frames: Tensor) -> PatchTokens:
        self.shapes.append(tuple(frames.shape))
        mark = frames[:, 0, 0, 0, 0]
        rows = len(mark)
        tokens = {
            "cls": mark[:, None].repeat(1, 2),
            "patches": mark[:, None, None, None].repeat(1, 2, 1, 2),
            "saliency": torch.zeros(rows, 2, 1),
        }
        for row, number in enumerate(mark.int().tolist()):
            if number in self.not_finite:
                tokens[self.not_finite[number]][row] = torch.nan
        return PatchTokens(**tokens)


class Decoders:
    """Decodes at once; `bad` clips fail."""

    def __init__(self, bad: frozenset[str] = frozenset()) -> None:
        self.bad = bad
        self.decoded: list[str] = []
        self.ahead: int | None = None

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(
        self, clips: Iterable[Clip], ahead: int | None = None, together: int = 1
    ) -> Iterator[PreparedClip | UndecodedClip]:
        self.ahead = ahead
        for clip in clips:
            self.decoded.append(clip.clip_id)
            if clip.clip_id in self.bad:
                yield UndecodedClip(clip, "it is bad", seconds=20.0)
            else:
                frames = np.full((2, 3, 4, 4), IDS.index(clip.clip_id), np.float32)
                yield PreparedClip(clip, frames, np.zeros(2, np.float32), f"sha of {clip.clip_id}", 9, 0.5)


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    spec = getattr(request, "param", SPEC)
    return create_store(tmp_path / "store", spec, Fingerprint({"arch": "mine"}), IDS)


@pytest.fixture
def run(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobStats]:
    def run(
        encoder: Encoder, decoders: Decoders, on_progress: Callable[[int, int], None] = lambda *_: None
    ) -> JobStats:
        monkeypatch.setattr(pipeline, "open_decoders", lambda *_: decoders)
        monkeypatch.setattr(torch, "get_num_threads", lambda: BATCH)  # one core per clip of a batch, on any machine
        config = Config(
            video=VideoConfig(frames=2, size=16),
            encoder=EncoderConfig(batch=BATCH),
            store=StoreConfig(path=store.path, dtype="float32", shard=2),
            engine=EngineConfig(max_errors=4),
        )
        clips = {name: Clip(name, Path(name)) for name in IDS}
        works = store.missing_shards()
        job = SimpleNamespace(
            config=config,
            device=torch.device("cpu"),
            frame_kind=None,
            open_batch_encoder=lambda: CoreEncoder(encoder, BATCH, "float32", EGOVLP_TRANSFORM),  # type: ignore[arg-type]
        )
        return encode_shards(job, store, works, clips, 1, on_progress)  # type: ignore[arg-type]

    return run


def test_every_clip_becomes_its_own_row(store: Store, run: Callable[..., JobStats]) -> None:
    progress: list[tuple[int, int]] = []
    encoder = Encoder()
    stats = run(encoder, Decoders(), lambda clips, nbytes: progress.append((clips, nbytes)))
    assert store.read(IDS).patches[:, 0, 0, 0].tolist() == list(range(len(IDS)))
    assert store.sources(IDS) == {name: f"sha of {name}" for name in IDS}
    assert (stats.committed, stats.quarantined, stats.skipped) == (len(IDS), 0, ())
    assert sum(clips for clips, _ in progress) == len(IDS)
    assert sum(nbytes for _, nbytes in progress) == len(IDS) * store.row_bytes
    assert stats.stages.decode_s == 0.5 * len(IDS)


@pytest.mark.parametrize("store", [StoreSpec.for_patches(2, (1, 1), 2, "int8", 2)], indirect=True)
def test_progress_counts_the_stored_bytes_of_a_quantised_store(store: Store, run: Callable[..., JobStats]) -> None:
    progress: list[int] = []
    run(Encoder(), Decoders(), lambda clips, nbytes: progress.append(nbytes))
    assert sum(progress) == len(IDS) * store.row_bytes


def test_bad_clips_anywhere_in_a_shard_are_quarantined(store: Store, run: Callable[..., JobStats]) -> None:
    bad = frozenset({"clip0", "clip3", "clip6", "clip7"})  # first, last, and both
    encoder = Encoder()
    stats = run(encoder, Decoders(bad))
    good = [name for name in IDS if name not in bad]
    assert list(store.clip_ids) == good
    assert store.read(good).patches[:, 0, 0, 0].tolist() == [IDS.index(name) for name in good]
    assert store.quarantine.keys() == bad
    assert (stats.committed, stats.quarantined) == (8, 4)
    assert stats.stages.decode_s == 8 * 0.5
    assert stats.stages.decoders_s == 8 * 0.5 + 4 * 20  # of one child, which the encoder waited for all the time
    # Whatever is missing from a batch, the network sees one shape.
    assert encoder.shapes == [(1, 2, 3, 4, 4)] * len(good)


def test_one_bad_clip_too_many_stops_the_job(store: Store, run: Callable[..., JobStats]) -> None:
    with pytest.raises(
        TooManyErrors, match=r"clips in quarantine: [56], engine\.max_errors allows 4; the first is clip0"
    ):
        run(Encoder(), Decoders(frozenset(IDS[:6])))
    store.catalog.refresh()
    assert not set(IDS[8:]) & set(store.clip_ids)
    assert not list((store.path / "leases").glob("*.json"))


def test_error_share_is_checked_without_listing_all_clips(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared after each shard, and a store may have millions of clips."""
    monkeypatch.delattr(Store, "planned_ids")
    with BackgroundShardWriter(store, 0.5) as writer:
        assert [writer._too_many(count) for count in (6, 7)] == [False, True]


def test_encoding_overlaps_with_a_slow_disk_and_then_waits(
    store: Store, run: Callable[..., JobStats], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, waits, write, wait = threading.Event(), threading.Event(), store.write_shard, BackgroundShardWriter._wait_for

    def slow(*args: Any, **named: Any) -> None:
        assert disk.wait(60)
        write(*args, **named)

    def waiting(writer: BackgroundShardWriter, unfinished: int) -> None:
        if len(writer._unfinished) > unfinished:
            waits.set()  # from here on the job's thread does nothing until the disk is free
        wait(writer, unfinished)

    monkeypatch.setattr(store, "write_shard", slow)
    monkeypatch.setattr(BackgroundShardWriter, "_wait_for", waiting)
    encoder, decoders = Encoder(), Decoders()
    job = threading.Thread(target=run, args=(encoder, decoders))
    job.start()
    assert waits.wait(60)
    # Some are being written, the next waits for the disk and one more was decoded and given to the encoder: no further.
    assert len(decoders.decoded) == (shards_at_once() + 2) * BATCH
    assert not store.clip_ids
    disk.set()
    job.join(60)
    assert store.clip_ids == IDS
    assert len(encoder.shapes) == len(IDS)


@pytest.mark.parametrize(
    ("array", "bad"), [("cls", "clip6"), ("patches", "clip6"), ("saliency", "clip6"), ("cls", "clip2")]
)
def test_only_the_clip_with_non_finite_tokens_is_quarantined(
    store: Store, run: Callable[..., JobStats], array: str, bad: str
) -> None:
    """Beside a clip that cannot be decoded, in another shard or in its own, each with one attempt."""
    stats = run(Encoder({"clip3": array}), Decoders(frozenset({bad})))
    assert set(store.clip_ids) == set(IDS) - {"clip3", bad}
    assert {name: record.attempts for name, record in store.quarantine.items()} == {"clip3": 1, bad: 1}
    assert store.quarantine["clip3"].reason.startswith(
        f"{array} of its tokens holds NaN or infinity, while other clips"
    )
    assert (stats.committed, stats.quarantined) == (10, 2)


def test_a_clip_that_another_job_has_put_in_quarantine_is_not_tried_again(
    store: Store, run: Callable[..., JobStats]
) -> None:
    other = open_store(store.path)
    works = other.missing_shards()
    run(Encoder(), Decoders(frozenset({"clip2"})))
    with BackgroundShardWriter(other, 4) as writer:
        assert not any(to_encode for _, to_encode in writer.leases(works))
    retries = other.missing_shards(retry_quarantined=True)
    with BackgroundShardWriter(other, 4) as writer:
        assert [to_encode for _, to_encode in writer.leases(retries)] == [("clip2",)]


def test_non_finite_text_states_are_blamed_on_the_text_encoder(tmp_path: Path) -> None:
    spec = StoreSpec.for_text(length=2, width=3)
    store = create_store(tmp_path / "text", spec, Fingerprint({"arch": "mine"}), ["what?", "who?"])
    (work,) = store.missing_shards()
    row = {"states": torch.ones(2, 3, dtype=torch.float16), "attention_mask": torch.ones(2, dtype=torch.bool)}
    rows = {"what?": row, "who?": row | {"states": row["states"] * float("nan")}}
    message = (
        "1 of 2 texts, such as 'who?', came out with NaN or infinity in their states, so none was stored; the text "
        "half of the encoder mine"
    )

    def write() -> None:
        with BackgroundShardWriter(store, max_errors=0) as writer:
            for found, _ in writer.leases([work]):
                writer.write(EncodedShard(found, "", rows, dict.fromkeys(rows, "x")))
            writer.wait()

    with pytest.raises(StoreError, match=re.escape(message)):
        write()
    assert not store.clip_ids


def test_shard_of_only_non_finite_clips_is_blamed_on_the_encoder(store: Store, run: Callable[..., JobStats]) -> None:
    with pytest.raises(
        StoreError,
        match=r"all 2 clips of shard 0 of .* so none was stored; the encoder mine or its arithmetic is at fault, or "
        r"its tokens exceed store.dtype: check encoder.checkpoint, or use --encoder.dtype float32 or another --store",
    ):
        run(Encoder(dict.fromkeys(IDS, "patches")), Decoders())
    store.catalog.refresh()
    assert not store.clip_ids
    assert not store.quarantine


def test_decoding_runs_a_batch_ahead(run: Callable[..., JobStats]) -> None:
    decoders = Decoders()
    run(Encoder(), decoders)
    assert decoders.ahead == BATCH + 2


def test_failing_disk_stops_the_job_and_releases_its_leases(
    store: Store, run: Callable[..., JobStats], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(store, "write_shard", full)
    with pytest.raises(StoreError, match="no space left"):
        run(Encoder(), Decoders())
    assert not list((store.path / "leases").glob("*.json"))


def test_shards_held_by_another_job_are_skipped_and_named(store: Store, run: Callable[..., JobStats]) -> None:
    with lease.hold(store.path, 1):
        stats = run(Encoder(), Decoders())
    assert store.missing() == ("clip2", "clip3")
    (line,) = stats.skipped
    assert line.startswith(f"shard 1 of {store.path} is held by process ")


def test_shards_that_become_free_are_done_at_the_end(
    store: Store, run: Callable[..., JobStats], monkeypatch: pytest.MonkeyPatch
) -> None:
    lease_shard, requested = store.lease, []

    def owned_at_first(shard: int) -> object:
        requested.append(shard)
        if shard == 1 and requested.count(1) == 1:
            raise ShardOwned("held by a job that is about to die")
        return lease_shard(shard)

    monkeypatch.setattr(store, "lease", owned_at_first)
    stats = run(Encoder(), Decoders())
    assert requested == [0, 1, 2, 3, 4, 5, 1]
    assert store.clip_ids == IDS
    assert stats.skipped == ()


def test_statistics_add_up() -> None:
    one = JobStats(1, 2, ("a",), Stages(total_s=1.0, encode_s=0.5), 1, {"c": 0.5})
    two = one + JobStats(3, 4, ("b",), Stages(total_s=3.0, encode_s=2.5), 2, {"d": 1.5})
    assert two == JobStats(4, 6, ("a", "b"), Stages(total_s=4.0, encode_s=3.0), 3, {"c": 0.5, "d": 1.5})
    assert two.timed == 1
    assert "of 4.0 s: starting 0.0%, waiting for the encoder 75.0%, " in str(two.stages)
