"""Primitives that touch a disk or a bucket: durable file operations, leases, object requests, checked JSON records.

Nothing in this room knows what a store looks like. Other rooms of `features` may use every module; `extract` and
`train` use `fields`, `files`, `file_lease`, `lfs` and `process`.
"""
