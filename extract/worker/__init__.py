"""One worker of stage one: it resolves the config (`job`), decodes, encodes and has its shards written (`pipeline`).

Other rooms use `job.resolve_job` and `job.ExtractionJob`, `pipeline.encode_shards`, `batch_encoder.BatchEncoder`, the
statistics in `job_stats`, and the device checks in `device`.
"""
