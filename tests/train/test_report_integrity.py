"""The report opens the stores that the cards name, wherever they are."""

from pathlib import Path

import pytest

from egopatch.train.report.integrity import StoreFacts, grid_of, store_facts
from egopatch.train.rundir.results import gather
from tests.features.conftest import FINGERPRINT, IDS, fill, maker
from tests.features.objects import bucket, environment, server
from tests.train.fake_runs import write_run

__all__ = ["bucket", "environment", "server"]


def facts_of(store: str, folder: Path) -> StoreFacts:
    write_run(folder, "psa", config={"store": {"path": store}}, card={"fingerprint": FINGERPRINT.fields})
    (facts,) = store_facts(gather(folder), (), Path())
    return facts


def test_facts_of_a_store_in_object_storage_are_read(bucket: str, tmp_path: Path) -> None:
    fill(maker(f"{bucket}/store", "zarr")(), skip=(IDS[0],))
    facts = facts_of(f"{bucket}/store", tmp_path / "runs")
    assert facts.store is not None
    assert (facts.problem, facts.differences) == ("", ())
    assert (len(facts.store.clip_ids), len(facts.store.planned_ids)) == (9, 10)
    assert grid_of(f"{bucket}/store", 224) == (2, 3)


def test_facts_of_a_store_in_a_folder_are_read(tmp_path: Path) -> None:
    fill(maker(tmp_path / "store", "hdf5")())
    facts = facts_of(str(tmp_path / "store"), tmp_path / "runs")
    assert facts.store is not None
    assert (facts.problem, len(facts.store.clip_ids), facts.store.format) == ("", 10, "hdf5")


def test_missing_object_storage_credentials_give_a_one_line_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    facts = facts_of("s3://bucket/store", tmp_path / "runs")
    assert facts.problem.startswith("s3://bucket/store needs credentials, but AWS_ACCESS_KEY_ID")
