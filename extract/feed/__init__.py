"""Decoded clips on their way to the encoder: child processes fill slots of shared memory, where frames stay.

`pool` hands out the children's results, and `clips` defines what a child leaves in a slot: finished input if a CPU
encodes (`on_host`), else pixels, which the device turns into input (`on_device`).
"""
