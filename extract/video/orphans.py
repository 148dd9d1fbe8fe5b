"""Children do not outlive the process that started them."""

import multiprocessing
import os


def end_with_parent() -> None:
    """End this process when its parent is gone: a thread of a child waits here.

    A job that is killed outright cannot stop its children.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
