"""Errors that stage one raises, in a module that imports neither the networks nor torch."""


class JobFailed(RuntimeError):
    """A job of stage one that cannot continue. Committed shards are kept; the message says what to try."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and says why, in one line."""
