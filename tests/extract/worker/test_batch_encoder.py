"""Clips encoded in parallel on the cores of a CPU."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from egopatch.extract.datasets import Clip
from egopatch.extract.encoders import load_video_encoder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.feed.clips import Cut, Pixels, PreparedClip
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM
from egopatch.extract.worker.batch_encoder import BatchEncoder, Row
from egopatch.extract.worker.on_cores import CoreEncoder
from egopatch.features import PatchTokens
from tests.extract.encoders.networks import tiny


@pytest.fixture
def encoder(tmp_path: Path) -> VideoEncoder:
    return load_video_encoder("egovlpv2", tiny(tmp_path), num_frames=2, depth=2)


def clips(encoder: VideoEncoder, count: int) -> list[PreparedClip]:
    rng = np.random.default_rng(0)
    shape = (2, 3, encoder.size, encoder.size)
    return [
        PreparedClip(Clip(f"c{i}", Path("a")), rng.random(shape, np.float32), np.zeros(2, np.float32), "hash", 1, 0.0)
        for i in range(count)
    ]


def encoded(batches: BatchEncoder, clips: Sequence[PreparedClip]) -> dict[str, Row]:
    for clip in clips:
        batches.add(clip)
    return batches.start()().rows


def test_clip_tokens_do_not_depend_on_the_batch(encoder: VideoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # on any machine
    asked = clips(encoder, 2)
    with CoreEncoder(encoder, 2, "float32", EGOVLP_TRANSFORM) as batches:
        together = encoded(batches, asked)
        alone = {name: row for one in asked for name, row in encoded(batches, [one]).items()}
        assert encoded(batches, []) == {}
    assert list(together) == [one.clip.clip_id for one in asked]
    for name, row in together.items():
        assert row.keys() == {"cls", "patches", "saliency", "timestamps"}
        assert all(torch.equal(tensor, alone[name][key]) for key, tensor in row.items())
    whole = encoder(torch.from_numpy(np.stack([one.frames for one in asked])))
    rows = torch.stack([row["patches"] for row in together.values()])
    torch.testing.assert_close(rows, whole.patches, rtol=1e-4, atol=1e-5)


def test_frames_of_several_sizes_become_the_input(encoder: VideoEncoder) -> None:
    (one,) = clips(encoder, 1)
    frames = [np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8) for size in ((30, 40), (50, 36))]
    cuts = [Cut(frame.shape[:2], EGOVLP_TRANSFORM.looks_at(*frame.shape[:2])) for frame in frames]
    runs = tuple(
        Pixels(frame[None, cut.window.rows, cut.window.columns], cut) for frame, cut in zip(frames, cuts, strict=True)
    )
    expected = encoder(to_input(frames, encoder.size)[None])
    with CoreEncoder(encoder, 1, "float32", EGOVLP_TRANSFORM) as batches:
        (row,) = encoded(batches, [replace(one, frames=runs)]).values()
    assert torch.equal(row["patches"], expected.patches[0])


def test_rows_are_copies_of_what_the_encoder_may_use_again(
    encoder: VideoEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, former = encoder.forward, list[PatchTokens]()

    def reuses_memory(frames: Tensor) -> PatchTokens:
        tokens = forward(frames)
        former[:] = former or [tokens]
        for name, tensor in tokens.tensors().items():
            former[0].tensors()[name].copy_(tensor)
        return former[0]

    asked = clips(encoder, 2)
    with CoreEncoder(encoder, 1, "float32", EGOVLP_TRANSFORM) as batches:
        expected = {name: row for one in asked for name, row in encoded(batches, [one]).items()}
        monkeypatch.setattr(encoder, "forward", reuses_memory)
        found = {name: row for one in asked for name, row in encoded(batches, [one]).items()}
    for name, row in found.items():
        assert all(torch.equal(tensor, expected[name][key]) for key, tensor in row.items())


def test_cores_encode_in_parallel_and_the_thread_count_is_restored(
    encoder: VideoEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = torch.get_num_threads()
    if cores < 2:
        pytest.skip("one core has no neighbours")
    met, seen = threading.Barrier(2, timeout=20), []
    forward = encoder.forward

    def meet(frames: Tensor) -> PatchTokens:
        met.wait()  # breaks unless another clip is encoded at the same time
        seen.append(torch.get_num_threads())
        return forward(frames)

    monkeypatch.setattr(encoder, "forward", meet)
    with CoreEncoder(encoder, 2, "float32", EGOVLP_TRANSFORM) as batches:
        assert len(encoded(batches, clips(encoder, 2))) == 2
    assert seen == [cores // 2] * 2
    assert torch.get_num_threads() == cores
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [cores]


def test_error_in_an_encoding_thread_is_raised(encoder: VideoEncoder) -> None:
    (bad,) = clips(encoder, 1)
    small = PreparedClip(bad.clip, bad.frames[:, :, :8], bad.timestamps, bad.source, bad.size, 0.0)
    with (
        CoreEncoder(encoder, 2, "float32", EGOVLP_TRANSFORM) as batches,
        pytest.raises(ValueError, match="frames has shape"),
    ):
        encoded(batches, [small])
