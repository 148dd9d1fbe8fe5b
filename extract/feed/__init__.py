"""Decoded clips on their way to the encoder: child processes fill slots of shared memory, where frames stay.

`pool` hands out what the children make of clips, and `clips` is what a child leaves in a slot: finished input where a
CPU encodes (`on_host`), else pixels, which the device turns into input (`on_device`).
"""
