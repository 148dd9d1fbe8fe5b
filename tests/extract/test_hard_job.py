"""A whole job over all difficult videos: good ones are stored, bad ones are quarantined with a reason."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from egopatch.extract.__main__ import main
from egopatch.extract.encoders import load_video_encoder
from egopatch.extract.feed.on_host import to_input
from egopatch.extract.video.frames import uniform_indices
from egopatch.features import open_store
from egopatch.features.tools.verify import verify
from tests.extract.job import config_of, contents, ledger_lines, options
from tests.extract.video.odd_videos import ODD, REFUSED, full_decode
from tests.extract.video.test_hard_videos import READABLE, UNREADABLE
from tests.extract.video.videos import FPS, write_video


def devours(to: Path) -> Path:
    """Frames whose pixels alone take more memory than a child may have."""
    return write_video(to / "a.mp4", frames=5, size=(3840, 2160))


LIMITED = {"devours memory": (devours, r"took over 0\.2 GB of memory to decode \(video\.memory_gb\)")}
BAD = {**UNREADABLE, **REFUSED, **LIMITED}


@pytest.fixture
def hard(made: Path, tmp_path: Path) -> Path:
    """A data set of all of them."""
    root = tmp_path / "hard"
    (root / "data").mkdir(parents=True)
    for name in ("weights.pth", "tokenizer"):
        (root / name).symlink_to(made / name)
    makers = {name: case.make for name, case in {**READABLE, **ODD}.items()}
    makers |= {name: make for name, (make, _) in BAD.items()}
    clips, questions = [], []
    for name, make in makers.items():
        folder = root / "data" / name
        folder.mkdir()
        video = make(folder).relative_to(root / "data")
        clips.append({"clip_id": name, "video": str(video)})
        questions += [
            {"question_id": f"{name}-{part}", "clip_id": name, "question": "what?", "answer": "that", "part": part}
            for part in ("train", "val", "test")
        ]
    for file, records in (("clips", clips), ("questions", questions)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (root / "data" / f"{file}.jsonl").write_text(text)
    return root


@pytest.mark.slow
def test_job_stores_good_videos_and_quarantines_bad_ones(hard: Path) -> None:
    limits = ("--video.memory_gb", "0.2", "--data.name", "jsonl")
    assert main(["run", *options(hard, *limits)]) == 0
    store = open_store(hard / "store")
    assert set(store.clip_ids) == {*READABLE, *ODD}
    assert store.quarantine.keys() == BAD.keys()
    for name, record in store.quarantine.items():
        assert re.search(BAD[name][1], record.reason), record.reason
        assert str(hard / "data" / name) in record.reason
        assert "\n" not in record.reason
        assert record.attempts == 1
        assert record.traceback or name in LIMITED  # a killed child has none to give
    config = config_of(hard)
    for name, case in READABLE.items():
        timestamps = store.read([name]).timestamps
        assert timestamps is not None
        expected = case.first_s + uniform_indices(len(case.shown), config.video.frames) / FPS
        np.testing.assert_allclose(timestamps[0], expected, atol=case.unit_s)
    lines = (hard / "data" / "clips.jsonl").read_text().splitlines()
    videos = {clip["clip_id"]: hard / "data" / clip["video"] for clip in map(json.loads, lines)}
    encoder = load_video_encoder(
        config.encoder.arch, config.encoder.checkpoint, config.video.frames, config.encoder.depth, config.encoder.path
    )
    for name in ODD:
        stored = store.read([name])
        assert stored.timestamps is not None
        times_s, shown = full_decode(videos[name])
        if ODD[name].times_s is not None:
            times_s = np.array(ODD[name].times_s)
        rows = np.abs(times_s - stored.timestamps[0].numpy()[:, None]).argmin(1)
        frames = to_input([shown[row] for row in rows], config.video.size)
        with torch.inference_mode():
            tokens = encoder(frames[None])
        torch.testing.assert_close(stored.patches.float(), tokens.patches, rtol=0, atol=0.02)
    assert verify(hard / "store").ok
    before, committed = contents(hard / "store"), ledger_lines(hard / "store")
    assert main(["run", *options(hard, *limits)]) == 0
    assert contents(hard / "store") == before
    assert ledger_lines(hard / "store") == committed
