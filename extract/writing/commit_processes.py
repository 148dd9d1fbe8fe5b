"""Commits shards in child processes while a GPU encodes.

Checks, checksums, writing and reading back give up the GIL some sixty times a clip, and the thread that feeds the GPU
waits for it each time. A child has its own GIL, and finds the rows in memory that it shares with this process. This
process keeps the leases; a killed child leaves the same files behind as a killed writer.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from egopatch.extract.children.slots import SharedSlots, inherit, inherited
from egopatch.extract.children.spawned import ChildDied, SpawnedPool
from egopatch.extract.errors import JobFailed
from egopatch.features.formats.registry import format_named
from egopatch.features.state.commit import CommitTarget, RowSource, ShardCommit, commit_shard
from egopatch.features.values.spec import ArraySpec

_SMALL = 1 << 16  # bytes of a row that may be pickled


class CommitProcesses(SpawnedPool):
    """Children that commit shards of a store in a folder; a `features.state.commit.Committer`.

    Args:
        slots: Memory that holds the rows.
        count: Number of children; as many threads may call at a time.
        file_format: Name of the stores' file format, which children import before their first shard.
    """

    def __init__(self, slots: SharedSlots, count: int, file_format: str) -> None:
        self._slots = slots
        super().__init__("writing", count, _start_child, slots, file_format)

    def __call__(self, target: CommitTarget, commit: ShardCommit) -> None:
        """As `commit_shard`, in a child; this process commits shards with large rows that are not in the slots.

        Raises:
            JobFailed: The child was killed.
            ChildProcessError: No child can be started.
        """
        shared = self._shared(commit)
        if shared is None:
            commit_shard(target, commit)
            return
        try:
            self.schedule(commit_shard, target, shared).result()
        except ChildDied as error:
            raise JobFailed(
                f"the process that wrote shard {commit.shard} of {target.storage.location} was killed (exit code "
                f"{error.exit_code}), perhaps because memory ran out; run the same command again to resume"
            ) from error

    def _shared(self, commit: ShardCommit) -> ShardCommit | None:
        """The commit as a child can receive it; None if it holds large rows that are in no slot."""
        arrays: list[tuple[ArraySpec, Sequence[RowSource]]] = []
        for array, sources in commit.sources:
            rows = []
            for source in sources:
                row = source.content()
                offset = self._slots.offset_of(row)
                if offset is None and row.nbytes > _SMALL:
                    return None
                content = partial(_sent, row) if offset is None else partial(_in_slots, offset, row.dtype, row.shape)
                rows.append(replace(source, content=content))
            arrays.append((array, rows))
        return replace(commit, sources=arrays)


def _sent(row: NDArray) -> NDArray:
    """A row that is sent to the child."""
    return row


def _in_slots(offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray:
    """A row that a child finds in its slots."""
    nbytes = math.prod(shape) * dtype.itemsize
    return inherited().at(offset, nbytes).view(dtype).reshape(shape)


def _start_child(slots: SharedSlots, file_format: str) -> None:
    format_named(file_format)
    inherit(slots)
