"""Decoded clips on their way to the encoder: child processes fill a ring of shared memory, in which frames stay put.

`pool` starts the children and hands out what they make of clips, `ring` is the memory, `clips` is what a child leaves
in it: finished input where a CPU encodes (`on_host`), else pixels, which the device turns into input (`on_device`).
"""
