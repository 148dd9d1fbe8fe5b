"""Primitives that touch a disk or a bucket: durable file operations, leases, object requests, checked JSON records.

Nothing in this room knows what a store looks like. `extract` and `train` use it too, except for objects in a bucket.
"""
