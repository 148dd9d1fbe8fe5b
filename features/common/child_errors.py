"""Errors on their way from a child process to its parent."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager


class ChildError(RuntimeError):
    """An error of a child process, as text, because the error itself cannot be sent to another process."""


def sendable(error: BaseException) -> BaseException:
    """`error` if another process can build it again, else a `ChildError` with its type and text.

    An error that the parent cannot build would be replaced by one about pickling, and nobody would see the cause.
    """
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # classes may raise anything while they are pickled
        pass
    return ChildError(f"{type(error).__name__}: {' '.join(str(error).split())}")


class ChildTraceback(Exception):
    """The traceback of a child process as text: the cause of the error that came from it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@contextmanager
def sendable_errors() -> Iterator[None]:
    """Raise the errors of the block, or of the function that this decorates, as `sendable` returns them.

    The printed traceback of a `ChildError` begins with that of the original error.
    """
    try:
        yield
    except Exception as error:
        sent = sendable(error)
        raise sent from (error.__cause__ if sent is error else error)
