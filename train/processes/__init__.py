"""Processes that train together: ranks started by torchrun, forked processes on the cores of a CPU, and signals.

`distributed` is what ranks do together, `process_pool` runs calls in forked processes, and `stopping` handles signals.
"""
