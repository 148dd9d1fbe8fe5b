"""One job's slice of a store's shards, where several jobs divide them (`--shard i/N`)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # see `features`
    from egopatch.features import ShardWork


@dataclass(frozen=True)
class Slice:
    """Every `count`-th shard from `index` on, whether or not it is already done. The default is all shards."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Slice":
        """Read `i/N`, counted from 0.

        Raises:
            ValueError: `text` has another form, or i is not below N.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not match or int(match[1]) >= int(match[2]):
            raise ValueError(f"--shard is {text!r}; expected i/N with 0 <= i < N, such as 0/4 for the first of four")
        return cls(int(match[1]), int(match[2]))

    def has(self, shard: int) -> bool:
        """Whether a shard belongs to this slice."""
        return shard % self.count == self.index

    def of(self, works: "Sequence[ShardWork]") -> "list[ShardWork]":
        """The shards among `works` that belong to this slice."""
        return [work for work in works if self.has(work.shard)]


ALL_SHARDS = Slice()
