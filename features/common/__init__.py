"""Small helpers that all three packages share and that know nothing of stores, videos or heads.

`command_line` finds the command that a command line names, `progress` shows how far a task is, `signals` installs and
restores signal handlers, `parent` ends a child process with its parent, `units` formats sizes, `disk` measures free
space, `machine` counts the cores and GPUs that this process may use, and `pictures` draws frames.
"""
