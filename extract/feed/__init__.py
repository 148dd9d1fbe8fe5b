"""Decoded clips on their way to the encoder: child processes fill a ring of shared memory, in which frames stay put.

`pool` hands out what the children make of clips, and `clips` is what a child leaves in the ring: finished input where a
CPU encodes (`on_host`), else pixels, which the device turns into input (`on_device`).
"""
