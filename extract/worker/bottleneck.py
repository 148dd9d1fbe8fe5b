"""The bottleneck of a job: clips a second that each stage of a worker could do, and the option that raises the lowest.

The stages overlap, so a worker is as fast as its slowest one.
"""

from collections.abc import Mapping

from egopatch.extract.worker.job_stats import JobStats

# `extract plan` itself leaves this out.
ASK_PLAN = "; `egopatch extract plan` says whether small copies of the videos (`extract transcode`) would decode faster"
REMEDIES = {
    "decoding": f"add cores, or raise engine.decoders if cores are idle{ASK_PLAN}",
    "hand-over": "raise engine.workers: each worker has a process of its own for the hand-over",
    "encoder": "add GPUs (engine.workers), or try encoder.compile, a smaller encoder.depth or, on a GPU, encoder.dtype"
    " bfloat16",
    "disk": "use a faster disk for store.path (a faster network to it, if it is in a bucket), or store.dtype"
    " float8_e4m3, which halves what is written",
}


def ceilings(stats: JobStats) -> dict[str, float]:
    """Clips a second that each stage of one worker could do, as measured; stages that took no time are left out."""
    stages = stats.stages
    # Earlier versions did not record all of them.
    seconds = {
        "decoding": stages.decoders_s,
        "hand-over": stages.handover_s,
        "encoder": stages.busy_s or stages.encode_s,
        "disk": stages.write_s,
    }
    return {name: stats.timed / spent for name, spent in seconds.items() if spent > 0 and stats.timed}


def bottleneck_line(rates: Mapping[str, float], starting: float = 0.0) -> str | None:
    """One line: the slowest stage, its ceiling, what raises it, and the other ceilings; None if nothing is known.

    A stage a thousand times as fast as the slowest, such as hand-over if a CPU encodes, is left out.

    Args:
        rates: Result of `ceilings`.
        starting: Share of the job's time that passed before its first clip was decoded. From a half on, the line names
            that instead of what raises the slowest stage.
    """
    if not rates:
        return None
    slowest, *others = sorted(rates, key=rates.__getitem__)
    others = [name for name in others if rates[name] < 1000 * rates[slowest]]
    rest = ", ".join(
        f"{name} {rates[name]:.0f}" if rates[name] >= 10 else f"{name} {rates[name]:.1f}" for name in others
    )
    short = starting >= 0.5
    return (
        ("bound by its start, which any job has once; a longer one is " if short else "")
        + f"bound by {slowest}, at most {rates[slowest]:.1f} clips/s per worker"
        + (f" (the others: {rest})" if rest else "")
        + ("" if short else f"; {REMEDIES[slowest]}")
    )
