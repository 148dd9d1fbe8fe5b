"""What starting child processes needs."""

import errno
import os
from multiprocessing import synchronize

import pytest

from egopatch.extract.children.spawned import require_semaphores


def test_without_semaphores_the_message_says_who_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    require_semaphores("a test")
    monkeypatch.setattr(synchronize.SemLock, "__init__", refuse)
    with pytest.raises(ChildProcessError) as caught:
        require_semaphores("decoding in child processes")
    assert str(caught.value).startswith(
        "/dev/shm: Read-only file system; decoding in child processes needs semaphores there, a few kB: mount it for w"
    )
