"""The two halves of a data set's features: the clips, and inside their folder the states of the questions' texts."""

from egopatch.features.storage.interface import Storage
from egopatch.features.store.store import Store
from egopatch.features.values.errors import FingerprintMismatch

TEXT = "text"
_SHARED = ("arch", "checkpoint")  # fields of both fingerprints that say which network made the half


def halves(storage: Storage) -> list[str]:
    """The stores in the folder of a store, relative to it: itself, and its text states where it has them."""
    return ["", TEXT] if storage.exists(TEXT) else [""]


def mismatches(clips: Store, texts: Store) -> list[str]:
    """One line a field by which the halves are of two networks; fields that only one of them has are not compared."""
    here, there = clips.fingerprint.fields, texts.fingerprint.fields
    return [
        f"{name}: {here[name]!r} of the clips, {there[name]!r} of the texts"
        for name in _SHARED
        if name in here and name in there and here[name] != there[name]
    ]


def require_match(clips: Store, texts: Store) -> None:
    """Refuse clips and texts that two networks made: their features have nothing to do with each other.

    Raises:
        FingerprintMismatch: names the differing fields.
    """
    if different := mismatches(clips, texts):
        raise FingerprintMismatch(
            f"the clips in {clips.path} and the texts in {texts.path} were made by two networks "
            f"({'; '.join(different)}); move {texts.path} away and encode the texts again by `python -m extract run`"
        )
