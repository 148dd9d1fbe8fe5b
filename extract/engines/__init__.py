"""Starting workers and sharing a job's shards between them, in one process, with joblib or on a Ray cluster.

Other rooms use `dispatch.encode_with_engine`, `job_slice.Slice` for one job of a job array, and the counts of workers
and decoders in `sharing`.
"""
