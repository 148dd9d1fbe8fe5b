"""Whole jobs that encode on a device, from child processes to a store; the CPU runs the same code as a GPU."""

import errno
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from egopatch.configs.schema import Config, EncoderConfig, EngineConfig, StoreConfig, VideoConfig
from egopatch.extract.datasets import Clip
from egopatch.extract.encoders import find_network, load_video_encoder
from egopatch.extract.encoders.layers.graphs import EAGER_BATCHES
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.planning.plan import _probe
from egopatch.extract.video.frames import read_frames
from egopatch.extract.video.transforms import EGOVLP_TRANSFORM
from egopatch.extract.worker.batch_encoder import Row
from egopatch.extract.worker.job import ExtractionJob
from egopatch.extract.worker.job_stats import JobStats
from egopatch.extract.worker.on_device import DeviceEncoder
from egopatch.extract.worker.pipeline import encode_shards
from egopatch.extract.writing.commit_processes import CommitProcesses
from egopatch.extract.writing.shard_writer import BackgroundShardWriter, EncodedShard
from egopatch.features import Fingerprint, create_store
from egopatch.features.state.commit import CommitTarget, ShardCommit
from egopatch.features.tools.verify import verify
from tests.extract.encoders.networks import relative, tiny
from tests.extract.video.videos import write_video

FRAMES, BATCH = 2, 3
VIDEO = VideoConfig(frames=FRAMES, size=32)


class WholeJob:
    """Eight clips in two shards, one of them bad, and a device to encode them; on the CPU, which stands in for one."""

    def __init__(self, root: Path, device: torch.device) -> None:
        videos = [write_video(root / f"{i}.mp4", frames=20 + 7 * i) for i in range(2)]
        self.clips = {name: Clip(name, videos[i % 2]) for i, name in enumerate("abcdefg")} | {"bad": Clip("bad", root)}
        network, checkpoint = find_network("egovlpv2"), tiny(root)
        self.encoder = load_video_encoder(network, checkpoint, num_frames=FRAMES, depth=2)
        self.config = Config(
            video=VideoConfig(frames=FRAMES, size=self.encoder.size),
            encoder=EncoderConfig(batch=BATCH),
            store=StoreConfig(path=root / "store", dtype="float16", shard=4),
            engine=EngineConfig(max_errors=1),
        )
        self.job = ExtractionJob(self.config, network, device, checkpoint, self.encoder, EGOVLP_TRANSFORM)
        self.store = create_store(root / "store", self.job.spec, Fingerprint({"x": 1}), list(self.clips))

    def run(self) -> JobStats:
        return encode_shards(self.job, self.store, self.store.missing_shards(), self.clips, 1, lambda *_: None)


@pytest.fixture
def whole(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> WholeJob:
    if device.type == "cpu":  # the stand-in
        monkeypatch.setattr(ExtractionJob, "encodes_on_device", True)
    return WholeJob(tmp_path, device)


def test_whole_job_stores_good_clips_and_quarantines_the_bad_one(
    whole: WholeJob, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children that cut and children that write, slots, copies, batches that end with shards, a store that verifies."""
    commits: list[ShardCommit] = []

    def seen(self: CommitProcesses, target: CommitTarget, commit: ShardCommit) -> None:
        commits.append(commit)
        run_in_child(self, target, commit)

    run_in_child = CommitProcesses.__call__
    monkeypatch.setattr(CommitProcesses, "__call__", seen)
    stats = whole.run()
    # The device has found all numbers finite, so no child looks at them again.
    assert all(row.known_finite for commit in commits for _, rows in commit.sources for row in rows)
    assert sum(len(commit.rows) for commit in commits) == 7
    store, clips = whole.store, whole.clips
    assert (stats.committed, stats.quarantined) == (7, 1)
    assert store.quarantine.keys() == {"bad"}
    assert verify(store.path).ok
    tokens = store.read(list("abcdefg"))
    for i, name in enumerate("abcdefg"):
        frames = read_frames(clips[name], whole.config.video).frames
        expected = whole.encoder(to_input(frames, whole.encoder.size)[None].to(device))
        assert relative(tokens.patches[i].float(), expected.patches[0].float().cpu()) < 2e-3, name


def test_plan_does_not_time_the_batch_that_captures_the_graph(whole: WholeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = 0
    launch = DeviceEncoder._launch

    def captured(self: DeviceEncoder, clips: Sequence[PreparedClip]) -> Callable[[], tuple[list[Row], list[bool]]]:
        nonlocal launched
        launched += 1
        time.sleep(2.0 if launched == EAGER_BATCHES else 0.0)
        return launch(self, clips)

    monkeypatch.setattr(DeviceEncoder, "_launch", captured)
    assert _probe(whole.job, [whole.clips["a"]])["encoder"] > BATCH / 2.0


def test_interrupt_lets_a_started_write_finish(whole: WholeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows belong to the encoder, which must not release them before."""
    write, slowly = BackgroundShardWriter.write, BackgroundShardWriter._write

    def interrupted(self: BackgroundShardWriter, shard: EncodedShard) -> None:
        write(self, shard)
        raise KeyboardInterrupt

    def late(self: BackgroundShardWriter, shard: EncodedShard) -> tuple[int, int]:
        time.sleep(0.5)
        return slowly(self, shard)

    monkeypatch.setattr(BackgroundShardWriter, "write", interrupted)
    monkeypatch.setattr(BackgroundShardWriter, "_write", late)
    with pytest.raises(KeyboardInterrupt):
        whole.run()
    whole.store.catalog.refresh()
    assert whole.store.clip_ids == tuple("abcd")
    monkeypatch.undo()


def test_job_that_cannot_start_releases_its_shared_memory(whole: WholeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    def memories() -> int:
        return sum("/memfd:egopatch-slots" in line for line in Path("/proc/self/maps").read_text().splitlines())

    before = memories()
    monkeypatch.setattr("egopatch.extract.children.spawned._Process.start", refuse)
    with pytest.raises(ChildProcessError, match="cannot be started"):
        whole.run()
    gc.collect()  # the traceback
    assert memories() == before
