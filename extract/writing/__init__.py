"""Encoded shards on their way to the store: `shard_writer` leases and writes them on threads, beside the encoder.

Where a GPU encodes, `commit_processes` commits them in child processes, so that nothing waits for the GIL.
"""
