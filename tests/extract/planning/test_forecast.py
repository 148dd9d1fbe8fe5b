"""`extract plan --clips`: a job of any size, from what was measured on a small one."""

import dataclasses
import json
from pathlib import Path

import pytest

from egopatch.configs.schema import Config, ConfigError, StoreConfig
from egopatch.extract.__main__ import main
from egopatch.extract.planning.forecast import ClipCost, forecast, format_duration, given_cost, measured_cost
from egopatch.extract.worker.job_stats import JobStats, Stages, jobs_path, read_jobs, record_job
from egopatch.features import StoreSpec
from tests.extract.job import options

SPEC = StoreSpec.for_patches(16, (14, 14), 768, "float16", 64)
COST = ClipCost(encode_s=0.01, decode_s=0.16, write_s=0.004, source="a test")


def test_forecast_covers_five_million_clips() -> None:
    found = forecast(5_000_000, 64, 16, SPEC, "zarr", COST)
    assert found.shards == 78_125
    assert found.files == 4 * 78_125
    assert found.bytes_to_write == pytest.approx(24.1e12, rel=0.01)
    # 1,221 shards to the busiest GPU, 64 clips each, one in 10 ms.
    assert found.hours == pytest.approx(1221 * 64 * 0.01 / 3600)
    assert found.gpu_hours == pytest.approx(64 * found.hours)
    assert found.clips_per_second == pytest.approx(6400, rel=0.001)
    assert found.cores_to_keep_up == 16


@pytest.mark.parametrize(
    ("cost", "cores", "stage", "seconds"),
    [
        (COST, 32, "encoding", 0.01),
        (COST, 8, "decoding", 0.02),
        (dataclasses.replace(COST, write_s=0.05), 8, "writing", 0.05),
    ],
)
def test_slowest_stage_determines_the_duration(cost: ClipCost, cores: int, stage: str, seconds: float) -> None:
    found = forecast(6400, 10, cores, SPEC, "zarr", cost)
    assert found.bound_by == stage
    assert found.hours == pytest.approx(640 * seconds / 3600)


def test_more_gpus_than_shards_are_no_faster() -> None:
    few, many = (forecast(100, gpus, 64, SPEC, "hdf5", COST) for gpus in (2, 64))
    assert few.hours == many.hours
    assert few.files == 2
    assert forecast(10, 1, 64, SPEC, "hdf5", COST).hours == pytest.approx(10 * 0.01 / 3600)


@pytest.mark.parametrize("option", ["clips", "gpus", "cores"])
def test_zero_clips_gpus_or_cores_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", f"--{option}", "0"])
    assert f"--{option} is 0; expected a whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [float("inf"), 1e-320])
def test_impossible_encoding_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=f"--clips-per-second is {rate:g}; expected how many clips one GPU encodes"):
        given_cost(rate, None)


def test_costs_are_the_mean_over_all_jobs(tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert measured_cost(store) is None
    for clips, seconds in ((30, 60.0), (10, 20.0)):
        stages = Stages(total_s=seconds, encode_s=seconds, decode_s=seconds / 2, write_s=seconds / 4)
        record_job(Config(store=StoreConfig(path=store)), JobStats(committed=clips, stages=stages))
    found = measured_cost(store)
    assert found is not None
    assert (found.encode_s, found.decode_s, found.write_s) == (2.0, 1.0, 0.5)
    assert found.source.startswith("40 clips in ")
    assert given_cost(50, found).encode_s == 0.02
    assert given_cost(50, found).decode_s == 1.0
    assert "not counted" in given_cost(50, None).source


def test_clips_of_dead_workers_do_not_lower_the_measured_cost(tmp_path: Path) -> None:
    store = tmp_path / "store"
    all_died = JobStats(committed=10, untimed=10)
    record_job(Config(store=StoreConfig(path=store)), all_died)
    assert measured_cost(store) is None
    one_died = JobStats(committed=70, stages=Stages(total_s=60.0, encode_s=60.0), untimed=40)
    record_job(Config(store=StoreConfig(path=store)), one_died)
    found = measured_cost(store)
    assert found is not None
    assert found.encode_s == 2.0
    assert found.source.startswith("30 clips in ")


def test_truncated_line_of_the_job_log_is_skipped(tmp_path: Path) -> None:
    store = tmp_path / "store"
    record_job(Config(store=StoreConfig(path=store)), JobStats(committed=30))
    with jobs_path(store).open("r+b") as file:
        whole = file.read()
        file.write(whole[: len(whole) // 2])
    assert [job["committed"] for job in read_jobs(store)] == [30]
    record_job(Config(store=StoreConfig(path=store)), JobStats(committed=10))
    assert [job["committed"] for job in read_jobs(store)] == [30, 10]


def test_plan_with_a_clip_count_needs_no_data_set(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = [*options(bare, "--data.root", str(bare / "nowhere")), "--clips", "1000", "--gpus", "4", "--json"]
    assert main(["plan", *job]) == 2
    assert "has been measured; encode a few hundred clips first" in capsys.readouterr().err
    assert main(["plan", *job, "--clips-per-second", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["clips"], found["gpus"], found["shards"]) == (1000, 4, 200)
    assert found["hours"] == pytest.approx(2.5 / 3600)
    assert main(["plan", *job[:-1], "--clips-per-second", "100"]) == 0
    # A short job does not take `0.0 h`; how many cores decode as fast is not known.
    assert "time       2.5 s, 10 s of GPU time; bound by encoding\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hours", "shown"), [(1e-5, "0.036 s"), (0.01, "36 s"), (0.235, "14.1 min"), (1, "1.0 h"), (1234.56, "1234.6 h")]
)
def test_duration_has_the_unit_that_suits_it(hours: float, shown: str) -> None:
    assert format_duration(hours) == shown
