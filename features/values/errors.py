"""What can go wrong with a store. Every message is one line that says what was expected and what to do next."""

from collections.abc import Sequence


class StoreError(ValueError):
    """A store that cannot be opened, read or written as asked."""


class BadLocation(StoreError):
    """A path or URL at which no store can be."""


class FingerprintMismatch(StoreError):
    """A store made by something else: another network, other frames, another shape."""


class DamagedStore(StoreError):
    """Bytes on disk are not the ones that were committed."""


class OtherVersion(StoreError):
    """A store that another version of this program wrote; nothing is read from it and nothing is changed in it."""


class Overtaken(StoreError):
    """Another writer has added to the same journal in the meantime; what was to be added was not."""


class ShardOwned(StoreError):
    """Another live process owns the shard."""


class AbsentClip(StoreError, KeyError):
    """Clips asked for that were never committed.

    Attributes:
        ids: the absent ones, in the order in which they were asked for.
    """

    def __init__(self, ids: Sequence[str], where: str) -> None:
        self.ids = tuple(ids)
        self.where = where
        shown = ", ".join(repr(name) for name in self.ids[:5]) + (", ..." if len(self.ids) > 5 else "")
        self.message = f"{len(self.ids)} of the asked clips are not in {where}: {shown}; encode them, or ask for others"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type["AbsentClip"], tuple[tuple[str, ...], str]]:
        return AbsentClip, (self.ids, self.where)
