"""Decoded clips on their way to the encoder: child processes fill slots of shared memory, where frames stay.

`pool` hands out the children's results, and `clips` defines what a child leaves in a slot: pixels, which become input
where they are encoded, on a CPU (`on_host`) or on a device (`on_device`).
"""
