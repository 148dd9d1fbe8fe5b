"""`extract status`: how many clips the store holds, and how many are stale. Torch is not imported, to save time."""

import dataclasses
from collections.abc import Sequence

from egopatch.configs.command_line import ConfigParser, parse_config
from egopatch.configs.experiment_line import name_experiment
from egopatch.configs.schema import Config
from egopatch.extract.commands.again import after_quarantine
from egopatch.extract.datasets import Clip, DatasetError, load_clips
from egopatch.extract.datasets.origins import compare_origins, others_line
from egopatch.extract.worker.bottleneck import bottleneck_line, ceilings
from egopatch.extract.worker.job_stats import read_jobs, stats_of
from egopatch.features.common.command_line import print_result
from egopatch.features.common.units import format_bytes
from egopatch.features.state.counts import count_clips, first_in_quarantine, machines_line, read_ledger


def main(parser: ConfigParser, args: Sequence[str]) -> int:
    """Print the counts; returns 0."""
    config, options = parse_config(parser, args)
    ledger = read_ledger(config.store.path)
    clips = _clips(config)
    check = None if clips is None else compare_origins(clips, config.data.root, ledger.origins())
    named = None if clips is None else {clip.clip_id for clip in clips}
    counts, machines = count_clips(config.store.path, ledger, named), ledger.machines()
    others = None if named is None else len(ledger.clips.keys() - named)
    jobs = [stats_of(job) for job in read_jobs(config.store.path) if job["committed"]]
    rates = ceilings(jobs[-1]) if jobs else {}
    if options.json:
        checked = {"stale": None, "unrecorded": None} if check is None else dataclasses.asdict(check)
        more = {"others": others, "machines": machines, "ceilings": rates}
        print_result(True, dataclasses.asdict(counts) | checked | more)
        return 0
    print(
        f"{config.store.path}: {counts.committed}/{counts.planned} clips committed,"
        f" {counts.quarantined} quarantined, {counts.missing} missing, {format_bytes(counts.bytes)}"
    )
    if others:
        print(others_line(others))
    if failure := first_in_quarantine(config.store.path, ledger, named):
        clip_id, reason = failure
        print(f"first in quarantine: {clip_id}: {reason}")
        print(after_quarantine(args))
    lines = ["stale clips: not checked: the annotations cannot be read"] if check is None else check.lines()
    if line := machines_line(machines):
        lines.append(line)
    if line := bottleneck_line(rates, jobs[-1].stages.starting if jobs else 0.0):
        lines.append(f"the last job was {line}")
    for line in lines:
        print(name_experiment(line, args))
    return 0


def _clips(config: Config) -> tuple[Clip, ...] | None:
    """The clips that the annotations name; None where they cannot be read, as on a machine without the data."""
    try:
        return load_clips(config.data)
    except DatasetError:
        return None
