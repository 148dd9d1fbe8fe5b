"""Both stages with their store in object storage: killed, resumed, verified, trained on; equal to a folder's."""

import json
import signal
from pathlib import Path

import pytest

from egopatch.extract.__main__ import main as extract
from egopatch.extract.worker.job_stats import read_jobs
from egopatch.features import open_store
from egopatch.features.__main__ import main as features
from egopatch.features.values.location import parse_location
from egopatch.train.__main__ import main as train
from tests.extract.job import CLIPS, options, signal_all, start_job, wait_until
from tests.features.objects import KEY, SECRET, bucket, environment, objects, server

__all__ = ["bucket", "environment", "server"]


def patches_in(bucket: str) -> int:
    return sum("/patches/" in key for key in objects(bucket))


@pytest.mark.slow
def test_killed_job_resumes_and_trains_like_one_on_a_local_store(
    made: Path, bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"{bucket}/store"
    remote = options(made, "--store.path", url)
    job = start_job([*remote, "--shard", "0/2"])  # so that clips remain, however soon it ends
    wait_until(lambda: patches_in(bucket) or job.poll() is not None)
    assert patches_in(bucket)
    signal_all(job, signal.SIGKILL)
    said = "".join(job.communicate())
    before = open_store(url).clip_ids
    assert len(before) < CLIPS
    assert extract(["plan", *remote, "--probe", "0"]) == 0
    assert extract(["run", *remote]) == 0
    assert extract(["status", *remote, "--json"]) == 0
    assert features(["verify", url]) == 0
    for half in ("", "text"):
        here, there = open_store(made / "store" / half), open_store(parse_location(url) / half)
        ids = here.clip_ids
        assert there.clip_ids == ids
        assert there.catalog.clip_records(ids) == here.catalog.clip_records(ids)  # including every row's checksums
        shards = here.catalog.ledger.commits
        assert there.catalog.ledger.commits.keys() == shards.keys()
        assert all(there.catalog.ledger.commits[shard].files == shards[shard].files for shard in shards)

    scores = []
    for name, path, residency in (("here", made / "store", "ram"), ("ram", url, "ram"), ("disk", url, "disk")):
        run = ["--run.dir", str(tmp_path / name), "--run.table", str(tmp_path), "--train.epochs", "1"]
        assert train(["fit", *options(made, "--store.path", str(path), "--train.residency", residency, *run)]) == 0
        scores.append(json.loads((tmp_path / name / "test.json").read_text()))
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        scores[-1]["losses"] = [event["loss"] for event in log if event["event"] == "step"]
    assert scores[0] == scores[1] == scores[2]

    out, err = capfd.readouterr()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()) + b"".join(objects(bucket).values())
    for credential in (KEY, SECRET):
        assert credential not in said + out + err
        assert credential.encode() not in written
    assert read_jobs(url)[-1]["committed"] == CLIPS - len(before)


@pytest.mark.slow
def test_two_concurrent_jobs_write_the_same_store_as_one(made: Path, bucket: str) -> None:
    url = f"{bucket}/store"
    jobs = [start_job([*options(made, "--store.path", url), "--shard", f"{k}/2"]) for k in range(2)]
    said = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    for half in ("", "text"):
        here, there = open_store(made / "store" / half), open_store(parse_location(url) / half)
        assert there.clip_ids == here.clip_ids
        assert there.catalog.clip_records(here.clip_ids) == here.catalog.clip_records(here.clip_ids)
    assert sum(done["committed"] for done in read_jobs(url)) == CLIPS
    assert features(["verify", url]) == 0


def test_storage_errors_end_in_one_line_and_reveal_no_secrets(
    made: Path, tmp_path: Path, environment: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capfd.readouterr()
    run = ["--run.dir", str(tmp_path / "run")]
    nowhere = options(made, *run, "--store.path", "s3://nowhere-at-all/store")
    for command, code in ((extract, 1), (train, 1)):
        assert command(["run" if command is extract else "fit", *nowhere]) == code
        out, err = capfd.readouterr()
        assert "bucket 'nowhere-at-all' does not exist at 127.0.0.1" in err.strip().splitlines()[-1]
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for command in (extract, train):
        assert command(["run" if command is extract else "fit", *nowhere]) == 2
        assert "needs credentials, but AWS_SECRET_ACCESS_KEY is not set" in capfd.readouterr().err
    for path in (f"s3://{KEY}:{SECRET}@bucket/store", f"s3://bucket/store?secret={SECRET}"):
        for command in (extract, train):
            with pytest.raises(SystemExit, match="2"):
                command(["run" if command is extract else "fit", *options(made, *run, "--store.path", path)])
            out, err = capfd.readouterr()
            assert SECRET not in out + err
            assert "credentials come from the environment" in err
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
