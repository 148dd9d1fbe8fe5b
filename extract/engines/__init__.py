"""Starting workers and sharing a job's shards between them, in one process, with joblib or on a Ray cluster.

`dispatch` starts the workers of an engine, `sharing` is what each of them does, and `job_slice` is one job of an array.
"""
