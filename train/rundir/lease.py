"""The lease of a run's folder: one process at a time writes into it, and the others wait."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from egopatch.configs.schema import ConfigError
from egopatch.features import ShardOwned
from egopatch.features.common.os_errors import remedy_of
from egopatch.features.io import file_lease
from egopatch.features.io.files import make_folder
from egopatch.train.processes.distributed import Distributed

# Seconds between two attempts to take a lease: nothing tells this process that a holder on another machine has ended.
POLL_S = 0.5


@contextmanager
def hold(folder: Path, option: str = "run.dir") -> Iterator[None]:
    """Create a run's folder if necessary, and hold its lease inside the block.

    Args:
        folder: Folder of the run.
        option: The option that the folder follows from, for messages.

    Raises:
        ShardOwned: Another process holds it; the message names folder, host and process.
        ConfigError: The folder cannot be written.
    """
    with writable(option, folder):
        leases = file_lease.lease_path(folder, 0).parent
        make_folder(leases)
        if not os.access(leases, os.W_OK):
            refusal = errno.EROFS if os.statvfs(leases).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(refusal, os.strerror(refusal), str(leases))
    with file_lease.hold(folder, 0, _name(folder)):
        yield


@contextmanager
def hold_when_free(folder: Path, ranks: Distributed, check: Callable[[], object]) -> Iterator[None]:
    """Hold the lease on the first rank; while another process holds it, say so once and wait.

    Args:
        check: Raises if the folder holds something unsuitable. The first rank calls it before anything is created or
            waited for, and again after the wait, since the other process may have written to the folder.

    Raises:
        ConfigError: The folder cannot be written.
    """
    ranks.broadcast(check)
    with ExitStack() as lease:
        announced = False
        while True:
            try:
                ranks.broadcast(lambda: lease.enter_context(hold(folder)))
                break
            except ShardOwned as busy:
                if not announced:
                    ranks.print_once(f"waiting: {busy}")
                announced = True
            # All ranks wait here: a rank that waits in a collective call gives up after some minutes.
            time.sleep(POLL_S)
        ranks.broadcast(check)
        yield


def busy(folder: Path) -> str | None:
    """Text that says who holds the folder's lease and what to do about it; None if it is free."""
    owner = file_lease.holder(file_lease.lease_path(folder, 0))
    return None if owner is None else file_lease.describe(_name(folder), folder, owner)


@contextmanager
def writable(option: str, folder: Path) -> Iterator[None]:
    """Turn a file system error while `folder` is created into a ConfigError that names the option it follows from."""
    try:
        yield
    except OSError as error:
        remedy = remedy_of(error)
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}: {error.filename}); {f'{remedy}, or ' if remedy else ''}set "
            f"another --{option}"
        ) from None


def _name(folder: Path) -> str:
    return f"run folder {folder}"
