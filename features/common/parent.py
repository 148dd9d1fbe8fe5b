"""Child processes that do not outlive their parent, even when the parent is killed and cannot stop them."""

import multiprocessing
import os
import threading
import time

POLL_S = 0.5


def exit_with_parent() -> None:
    """Start a thread that ends this process, with exit code 1, once its parent is gone."""
    # multiprocessing knows its children's parent from the start; loky starts its workers without it.
    parent = multiprocessing.parent_process()
    pid = os.getppid() if parent is None else parent.pid
    threading.Thread(target=_exit_after, args=(pid,), daemon=True).start()


def _exit_after(parent: int | None) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)
