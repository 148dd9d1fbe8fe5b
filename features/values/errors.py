"""What can go wrong with a store. Every message is one line that names what was expected and what to do next."""

from collections.abc import Iterable, Sequence
from numbers import Integral

from egopatch.features.common.units import counted


class StoreError(ValueError):
    """A store cannot be opened, read or written as requested."""


class NoStore(StoreError):
    """Nothing is stored here yet, or the creation of the store was interrupted."""


class BadLocation(StoreError):
    """No store can exist at this path or URL."""


class FingerprintMismatch(StoreError):
    """A store was created with different settings: another network, other frames, another shape."""


class WrongOption(StoreError):
    """An option of a command does not fit the store that the command reads."""


class DamagedStore(StoreError):
    """Bytes on disk differ from those that were committed."""


class OtherVersion(StoreError):
    """Another version of this program wrote the store; nothing in it is read or changed."""


class RequestFailed(StoreError):
    """The server of object storage cannot be reached, or it refused or failed a request."""


class WriteConflict(StoreError):
    """Another writer added to the same journal first, so this write was not made."""


class ShardOwned(StoreError):
    """Another running process holds the shard's lease."""


class NotFinite(StoreError):
    """Tokens hold NaN or infinity, or numbers that the stored dtype cannot represent; nothing was written."""


class AbsentClip(StoreError, KeyError):
    """Requested clips were never committed.

    Attributes:
        ids: Missing clips, in the order of the request.
    """

    def __init__(self, ids: Sequence[str], where: str) -> None:
        self.ids = tuple(ids)
        self.where = where
        shown = ", ".join(repr(name) for name in self.ids[:5]) + (", ..." if len(self.ids) > 5 else "")
        clips = counted(len(self.ids), "requested clip is", "requested clips are")
        self.message = (
            f"{clips} missing from {where}: {shown}; run `extract run` to encode the missing clips, or `extract retry` "
            "for those in quarantine"
        )
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type["AbsentClip"], tuple[tuple[str, ...], str]]:
        return AbsentClip, (self.ids, self.where)


def write_conflict(name: object) -> WriteConflict:
    """The error that another writer changed `name` first."""
    return WriteConflict(f"another process has written {name} in the meantime; run the same command again")


def require_type(argument: str, value: object, kind: type, expected: str) -> None:
    """Refuse an argument of a function that notebooks call, such as a path in place of what it names.

    Args:
        argument: Its name.
        kind: The type that it must have.
        expected: The type in words, and how to make one.

    Raises:
        TypeError: It has another type.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{argument} is {one_line(value)}; expected {expected}")


def require_count(argument: str, value: object, thing: str) -> None:
    """Refuse anything but a whole number from 1 on.

    Args:
        argument: Name of the argument.
        thing: What it counts, in the singular.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is below 1.
    """
    require_type(argument, value, Integral, f"a whole number, at least 1 {thing}")  # NumPy's, too
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{argument} is {value}; expected at least 1 {thing}")


def require_ids(ids: object) -> None:
    """Refuse one id, or what is no list, where ids are expected; Python would read an id as a list of letters.

    Raises:
        TypeError: It is not a list, or another iterable, of ids.
    """
    if isinstance(ids, str):
        raise TypeError(f"ids is {ids!r}; expected a list of ids, such as [{ids!r}]")
    if not isinstance(ids, Iterable):
        raise TypeError(f"ids is {one_line(ids)}; expected a list of ids; clip_ids of a store lists them")


def one_line(value: object) -> str:
    """The beginning of a value for an error of one line: an open store, for one, describes itself in several."""
    return f"{' '.join(repr(value).split()):.60}"
