"""Small helpers that all three packages share and that know nothing of stores, videos or heads.

`command_line` finds the command that a command line names, prints its result and picks the faults that are shown,
`progress` shows a task's progress, `signals` installs and restores signal handlers, `parent` ends a child process with
its parent, `child_errors` sends an error from a child to its parent, `os_errors` says in one line what the system or a
GPU refuses, `units` formats sizes, `disk` names a file system and its free space, `machine` counts the cores and GPUs
that this process may use, and `pictures` draws frames.
"""
