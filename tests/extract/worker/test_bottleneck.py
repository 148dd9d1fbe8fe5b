"""The bottleneck of a job is named, with the maximum throughput of each stage."""

from egopatch.extract.worker.bottleneck import REMEDIES, bottleneck_line, ceilings
from egopatch.extract.worker.job_stats import JobStats, Stages, stats_of

STAGES = Stages(total_s=10, decode_s=32, decoders_s=8, handover_s=0.5, encode_s=9, busy_s=4, write_s=2)


def test_the_slowest_stage_is_named_with_its_remedy() -> None:
    found = ceilings(JobStats(committed=400, stages=STAGES))
    # The encoder computed for four of its nine seconds; it waited for clips in the others.
    assert found == {"decoding": 50, "hand-over": 800, "encoder": 100, "disk": 200}
    line = bottleneck_line(found)
    assert line is not None
    assert line.startswith(
        "bound by decoding, at most 50.0 clips/s per worker (the others: encoder 100, disk 200, hand-over 800); "
    )
    assert line.endswith(REMEDIES["decoding"])


def test_a_job_that_mostly_started_is_not_told_to_add_hardware() -> None:
    rates = ceilings(JobStats(committed=400, stages=STAGES))
    assert bottleneck_line(rates, Stages(total_s=10, start_s=4.9).starting) == bottleneck_line(rates)
    assert bottleneck_line(rates, Stages(total_s=10, start_s=8).starting) == (
        "bound by its start, which any job has once; a longer one is bound by decoding, at most 50.0 clips/s per "
        "worker (the others: encoder 100, disk 200, hand-over 800)"
    )


def test_bfloat16_is_recommended_only_for_gpus() -> None:
    assert "on a GPU, encoder.dtype bfloat16" in REMEDIES["encoder"]


def test_a_bucket_is_not_sped_up_by_a_disk() -> None:
    assert "a faster network to it, if it is in a bucket" in REMEDIES["disk"]


def test_a_stage_that_takes_no_time_is_not_mentioned() -> None:
    line = bottleneck_line({"decoding": 10.6, "hand-over": 253043.4, "disk": 22.4})
    assert line is not None
    assert line.startswith("bound by decoding, at most 10.6 clips/s per worker (the others: disk 22); ")


def test_untimed_clips_do_not_count_towards_the_rate() -> None:
    assert ceilings(JobStats(committed=500, stages=STAGES, untimed=100))["encoder"] == 100
    assert ceilings(JobStats(committed=500, untimed=500)) == {}


def test_jobs_of_earlier_versions_report_only_the_recorded_stages() -> None:
    stages = {"total_s": 10.0, "start_s": 1.0, "decode_s": 32.0, "wait_decode_s": 0.0, "encode_s": 8.0}
    stages |= {"write_s": 2.0, "wait_write_s": 0.0}
    line = {"committed": 400, "quarantined": 0, "skipped": [], "stages": stages}
    assert ceilings(stats_of(line)) == {"encoder": 50, "disk": 200}


def test_job_without_clips_has_no_bound() -> None:
    assert ceilings(JobStats(stages=STAGES)) == {}
    assert bottleneck_line({}) is None
