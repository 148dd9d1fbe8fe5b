"""One worker of stage one: it resolves the config (`job`), decodes, encodes and has its shards written (`pipeline`).

Clips are encoded `on_cores` or `on_device`; `job_stats` has the time that each stage took, `bottleneck` the slowest.
"""
