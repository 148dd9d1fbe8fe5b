"""Encoding on a device: copies, transform and results; the CPU runs the same code in place of a GPU."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from egopatch.configs.schema import ConfigError, VideoConfig
from egopatch.extract.children.slots import SharedSlots
from egopatch.extract.datasets import Clip
from egopatch.extract.encoders import load_video_encoder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.feed.clips import Cut, Pixels, PreparedClip, SharedClip
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM
from egopatch.extract.worker.batch_encoder import BatchEncoder, EncodedBatch, Row
from egopatch.extract.worker.on_device import DeviceEncoder, _Clock, _rows_finite
from egopatch.features import PatchTokens
from tests.extract.encoders.networks import relative, tiny

FRAMES, BATCH = 2, 3
VIDEO = VideoConfig(frames=FRAMES, size=32)


@pytest.fixture
def encoder(tmp_path: Path) -> VideoEncoder:
    return load_video_encoder("egovlpv2", tiny(tmp_path), num_frames=FRAMES, depth=2)


class Slots:
    """Pixels of clips in shared slots, and which of them were released."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.slots = SharedSlots(32, 1 << 18, "pixels", "")
        self.released: list[str] = []
        self.frames: dict[str, list[np.ndarray]] = {}

    def clip(self, name: str, sizes: list[tuple[int, int]]) -> PreparedClip:
        rng = np.random.default_rng(len(self.frames))
        frames = self.frames[name] = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
        runs = []
        for frame in frames:
            window = EGOVLP_TRANSFORM.looks_at(*frame.shape[:2])
            part = frame[window.top : window.top + window.height, window.left : window.left + window.width]
            runs.append(Pixels([part], Cut(frame.shape[:2], window)))
        if len(set(sizes)) == 1:
            runs = [Pixels([run.frames[0] for run in runs], runs[0].cut)]
        return self._left(name, tuple(runs))

    def finished(self, name: str, size: tuple[int, int]) -> PreparedClip:
        """A clip whose frames the child had to transform."""
        frames = self.frames[name] = [np.full((*size, 3), 7 * len(self.frames), np.uint8)] * FRAMES
        return self._left(name, to_input(frames, self.side).numpy())

    def _left(self, name: str, frames: np.ndarray | tuple[Pixels, ...]) -> PreparedClip:
        slot = self.slots.take()
        memory = self.slots.memory(slot)
        times = np.arange(FRAMES, dtype=np.float32)
        left = SharedClip.write(PreparedClip(Clip(name, Path("a")), frames, times, "hash", 1, 0.0), memory)

        def release() -> None:
            memory[:] = 255  # another child writes there now
            self.released.append(name)

        return left.read(memory, release)


def run(batches: BatchEncoder, clips: list[PreparedClip]) -> EncodedBatch:
    for clip in clips:
        batches.add(clip)
    return batches.start()()


def test_rows_match_the_encoder_in_any_batch(encoder: VideoEncoder, device: torch.device) -> None:
    slots = Slots(encoder.size)
    encoder = encoder.to(device)
    groups = [
        [slots.clip("a", [(60, 80)] * 2), slots.clip("b", [(33, 21)] * 2), slots.clip("c", [(60, 80)] * 2)],
        [slots.clip("d", [(40, 30), (30, 40)])],
        [slots.finished("e", (50, 70)), slots.clip("f", [(100, 90)] * 2)],
    ]
    with DeviceEncoder(encoder, BATCH, "float16", EGOVLP_TRANSFORM, 8) as batches:
        found: dict[str, Row] = {}
        behind: Callable[[], EncodedBatch] = EncodedBatch
        for group in groups:  # as the pipeline does: each batch is waited for after the next one was started
            for clip in group:
                batches.add(clip)
            finish = batches.start()
            found |= behind().rows
            behind = finish
        found |= behind().rows
        assert batches.start()() == EncodedBatch()
        assert batches.seconds > 0
    assert list(found) == list("abcdef")
    for name, frames in slots.frames.items():
        expected = encoder(to_input(frames, encoder.size)[None].to(device))
        for key, tensor in expected.tensors().items():
            row = found[name][key]
            assert row.device.type == "cpu"
            assert row.dtype == (torch.float16 if key == "patches" else torch.float32)
            assert relative(row.float(), tensor[0].float().cpu()) < 2e-3, (name, key)
        assert found[name]["timestamps"].tolist() == [0, 1]
    assert sorted(slots.released) == list("abcdef")


def test_slots_are_released_while_the_batch_is_gathered(encoder: VideoEncoder, device: torch.device) -> None:
    slots = Slots(encoder.size)
    with DeviceEncoder(encoder.to(device), 12, "float32", EGOVLP_TRANSFORM, 8) as batches:
        for number in range(12):
            batches.add(slots.clip(str(number), [(20, 20)] * 2))
            assert len(slots.released) >= number + 1 - batches.held
        batches.start()()


def test_nothing_is_used_before_its_copy_has_ended(encoder: VideoEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has copied when the call returns; here a copy ends only when somebody waits for an event behind it."""
    added: list[str] = []
    ended: set[str] = set()
    results_ended: list[bool] = []

    class Event:
        def record(self, stream: object) -> None:
            self.behind, self.of_results = list(added), stream is batches._out

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            ended.update(() if self.of_results else self.behind)
            results_ended.extend([True] * self.of_results)

    monkeypatch.setattr(DeviceEncoder, "_event", lambda _: Event())
    slots = Slots(encoder.size)
    with DeviceEncoder(encoder, 12, "float32", EGOVLP_TRANSFORM, 8) as batches:
        for number in range(12):
            added.append(str(number))
            batches.add(slots.clip(str(number), [(20, 20)] * 2))
            assert set(slots.released) <= ended
        finish = batches.start()
        assert not results_ended
        finish()
        assert results_ended
        assert 0 < len(slots.released) < 12
        assert set(slots.released) <= ended


def test_rows_do_not_depend_on_the_other_clips_of_their_batch(encoder: VideoEncoder, device: torch.device) -> None:
    slots = Slots(encoder.size)
    with DeviceEncoder(encoder.to(device), 6, "float32", EGOVLP_TRANSFORM, 8) as batches:
        alone = run(batches, [slots.clip("a", [(60, 80)] * 2)]).rows["a"]
        slots.frames.clear()  # names give the pixels
        others = [slots.clip("a", [(60, 80)] * 2)]
        others += [slots.clip(name, [(60, 80) if name in "ce" else (33, 21)] * 2) for name in "bcdef"]
        found = run(batches, others).rows["a"]
    for name, tensor in alone.items():
        assert torch.equal(found[name], tensor), name


def test_the_device_finds_rows_that_are_not_finite(
    encoder: VideoEncoder, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: DeviceEncoder, tokens: PatchTokens) -> dict[str, Tensor]:
        tokens.patches[1, -1, -1, -1] = 1e6  # too large for the store's float16
        tokens.cls[3, -1] = torch.nan
        return convert(self, tokens)

    convert = DeviceEncoder._converted
    monkeypatch.setattr(DeviceEncoder, "_converted", damaged)
    slots = Slots(encoder.size)
    clips = [slots.clip(name, [(60, 80)] * 2) for name in "abcde"]
    clips[2] = replace(clips[2], timestamps=np.full(FRAMES, np.nan, np.float32))
    with DeviceEncoder(encoder.to(device), 6, "float16", EGOVLP_TRANSFORM, 8, capture=False) as batches:
        found = run(batches, clips)
    assert found.rows.keys() == set("abcde")
    assert found.finite == {"a", "e"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_non_finite_value_is_detected_at_any_position(dtype: torch.dtype, device: torch.device) -> None:
    largest = torch.finfo(dtype).max
    rows = torch.tensor([[-largest, 0, largest]] * 9, dtype=dtype, device=device)
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        for place in range(2):
            rows[3 * row + place, 2 * place] = value
    assert _rows_finite([torch.ones(9, 2, device=device), rows]).tolist() == [False, False, True] * 3


def test_float32_encoding_disables_tf32(
    encoder: VideoEncoder, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's default is TF32 in convolutions; a container of NVIDIA's, or a notebook, may want it in all products."""
    seen = []

    def noted(self: DeviceEncoder, received: object) -> None:
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        transform(self, received)  # type: ignore[arg-type]

    transform = DeviceEncoder._transform_all
    monkeypatch.setattr(DeviceEncoder, "_transform_all", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with DeviceEncoder(encoder.to(device), 1, "float32", EGOVLP_TRANSFORM, 8) as batches:
            run(batches, [Slots(encoder.size).clip("a", [(60, 80)] * 2)])
        assert seen == [(False, "highest")]
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.cuda
def test_cuda_graph_gives_the_same_bits_as_the_eager_encoder(
    encoder: VideoEncoder, cuda: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[dict[str, Row]] = []
    for capture in (False, True):
        slots = Slots(encoder.size)
        with DeviceEncoder(encoder.to(cuda), BATCH, "float16", EGOVLP_TRANSFORM, 8, capture) as batches:
            rows: dict[str, Row] = {}
            behind: Callable[[], EncodedBatch] = EncodedBatch
            for number in range(6):  # each is waited for after the next one was started
                for name in range(BATCH):
                    batches.add(slots.clip(f"{number}-{name}", [(60, 80)] * 2))
                finish = batches.start()
                rows |= behind().rows
                behind = finish
            found.append(rows | behind().rows)
    assert "one by one" not in capsys.readouterr().out
    eager, replayed = found
    assert eager.keys() == replayed.keys()
    for name, row in eager.items():
        for key, tensor in row.items():
            assert torch.equal(replayed[name][key], tensor), (name, key)


def test_ended_encoder_is_freed_at_once(encoder: VideoEncoder, device: torch.device) -> None:
    """A reference cycle would keep its input and its graph on the device until a collection."""
    gc.disable()
    try:
        with DeviceEncoder(encoder.to(device), 1, "float32", EGOVLP_TRANSFORM, 8) as batches:
            run(batches, [Slots(encoder.size).clip("a", [(60, 80)] * 2)])
        ended = weakref.ref(batches)
        del batches
        assert ended() is None
    finally:
        gc.enable()


def test_clip_with_the_wrong_number_of_frames_is_refused(encoder: VideoEncoder, device: torch.device) -> None:
    slots = Slots(encoder.size)
    with (
        DeviceEncoder(encoder.to(device), BATCH, "float32", EGOVLP_TRANSFORM, 8) as batches,
        pytest.raises(ValueError, match="a clip has 3 frames; this encoder takes 2"),
    ):
        run(batches, [slots.clip("a", [(20, 20)] * 3)])


def test_first_batches_do_not_raise_the_cost_of_a_clip(
    encoder: VideoEncoder, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries start there, and the graph is made; a forecast from a short job would be several times too slow."""
    assert DeviceEncoder.slow_batches == 2
    seconds = [9.0, 5.0, 1.0, 3.0, 2.0]
    monkeypatch.setattr(_Clock, "seconds", lambda _: seconds.pop(0))
    slots, busy = Slots(encoder.size), []
    with DeviceEncoder(encoder.to(device), BATCH, "float32", EGOVLP_TRANSFORM, 8) as batches:
        for number in range(5):
            run(batches, [slots.clip(str(number), [(60, 80)] * 2)])
            busy.append(batches.busy_s)
    assert busy == [9, 14, 3 * 1, 4 * 2, 5 * 2]


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, and of every module that it looks into
def test_compiled_encoder_on_a_gpu_matches_the_eager_one(tmp_path: Path, cuda: torch.device) -> None:
    checkpoint = tiny(tmp_path)
    plain = load_video_encoder("egovlpv2", checkpoint, num_frames=FRAMES, depth=2).to(cuda)
    fused = load_video_encoder("egovlpv2", checkpoint, num_frames=FRAMES, depth=2, compile=cuda).to(cuda)
    frames = torch.randn(2, FRAMES, 3, plain.size, plain.size, device=cuda)
    assert relative(fused(frames).patches, plain(frames).patches) < 1e-4


@pytest.mark.cuda
def test_lite_on_a_gpu_matches_lite_on_the_cpu(cuda: torch.device) -> None:
    try:
        plain = load_video_encoder("lite", None, num_frames=FRAMES, size=64)
    except ConfigError as error:
        pytest.skip(str(error))
    frames = torch.randn(2, FRAMES, 3, 64, 64)
    expected = plain(frames)
    found = plain.to(cuda)(frames.to(cuda))
    assert relative(found.patches.cpu(), expected.patches) < 1e-3
