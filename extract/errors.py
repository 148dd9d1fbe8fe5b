"""What stage one raises, for those who catch it without importing the networks and torch with them."""


class JobFailed(RuntimeError):
    """A job of stage one that cannot continue. Committed shards are kept; the message says what to try."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and says why, in one line."""
