"""Processes that train together: ranks started by torchrun, forked processes on the cores of a CPU, and signals.

Other rooms use `Distributed` and `join` (`distributed`), `call_in_processes` (`process_pool`) and `stop_signals`
(`stopping`).
"""
