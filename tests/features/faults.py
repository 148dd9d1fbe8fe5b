"""What goes wrong below a store: kills at any file operation, damaged files, and changes while a store is read."""

import os
import random
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from egopatch.features import Store
from egopatch.features.formats.interface import OpenShard
from egopatch.features.store.reader import RowReader
from tests.features.conftest import clip


def before_file_operations(act: Callable[[Callable, str, tuple], None]) -> None:
    """Call `act(operation, name, arguments)` before each operation of this process on the file system."""

    def wrap(operation: Callable, name: str) -> Callable:
        def wrapped(*args, **kwargs):
            act(operation, name, args)
            return operation(*args, **kwargs)

        return wrapped

    for name in ("write", "fsync", "ftruncate"):
        setattr(os, name, wrap(getattr(os, name), name))
    for name in ("replace", "unlink", "mkdir", "write_bytes"):
        setattr(Path, name, wrap(getattr(Path, name), name))


def killed_at(point: int) -> Callable[[], None]:
    """Make the `point`-th file operation of this process its last; a write gets half done before."""
    left = iter(range(point, -1, -1))

    def deadly(operation: Callable, name: str, args: tuple) -> None:
        if next(left) == 0:
            if name == "write":
                operation(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: before_file_operations(deadly)


def report_operations(pipe: int) -> None:
    """Write a byte into `pipe` before each file operation of this process."""
    write = os.write
    before_file_operations(lambda operation, name, args: write(pipe, b".") and None)


def count_operations(action: Callable[[], None]) -> int:
    """How many file operations `action` takes; it runs in a child."""
    reached, report = os.pipe()

    def counted() -> None:
        os.close(reached)
        report_operations(report)
        action()

    assert fork(counted).wait() == 0
    os.close(report)
    with os.fdopen(reached, "rb") as lines:
        return len(lines.read())


@dataclass(frozen=True)
class Child:
    """A forked process."""

    pid: int

    def kill(self) -> None:
        """End it at once, and wait until it has ended."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Its exit code; minus the number of the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork(action: Callable[[], object]) -> Child:
    """Run `action` in a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of newer Pythons: zarr restarts its thread after a fork
        child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return Child(child)


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """Inside the block this process may have no more than `value` of a resource, such as RLIMIT_FSIZE."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


class Picky(ValueError):
    """Like many library errors, it is not constructed from its message alone, and so cannot be pickled."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"error {number}: {why}")


def faulty_files(root: Path) -> list[Path]:
    """Every file that holds something: data, metadata, ledger, ids, heads."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)


def flip_bit(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damage_row(store: Store, clip: str) -> None:
    """Flip a bit in the patches of a clip of a store in a folder."""
    row = store.read([clip]).patches.numpy().tobytes()
    path = next(path for path in faulty_files(store.path) if row in path.read_bytes())
    content = path.read_bytes()
    path.write_bytes(flip_bit(content, 8 * content.find(row)))


def flip(content: bytes, chance: random.Random) -> bytes:
    return flip_bit(content, chance.randrange(8 * len(content)))


FAULTS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "flip": flip,
    "truncate": lambda content, chance: content[: chance.randrange(len(content))],
    "extend": lambda content, chance: content + chance.randbytes(9),
    "remove": lambda content, chance: None,
    "empty": lambda content, chance: b"",
}


def apply(path: Path, fault: str, chance: random.Random) -> bytes:
    before = path.read_bytes()
    after = FAULTS[fault](before, chance)
    path.unlink()
    if after is not None:
        path.write_bytes(after)
    return before


def before_a_shard_is_opened(monkeypatch: pytest.MonkeyPatch, shard: int, action: Callable[[], None]) -> None:
    """Call `action`, once, when a reader that has read other shards opens `shard`."""
    original, actions = RowReader._open_shard, [action]

    def opening(self: RowReader, number: int) -> OpenShard:
        if number == shard and actions:
            actions.pop()()
        return original(self, number)

    monkeypatch.setattr(RowReader, "_open_shard", opening)


def replace_rows(store: Store, seed: int, *ids: str) -> None:
    """Give the clips other rows, made of another video."""
    for work in store.missing_shards(replace=ids):
        rows = {name: clip(seed, store.spec) for name in work.ids if name in ids}
        if rows:
            store.write_shard(work.shard, rows, dict.fromkeys(rows, "new"), replaces=work.replaces)
