"""The store of precomputed features: the contract between stage one, which writes it, and stage two, which reads it."""

from importlib import import_module
from typing import TYPE_CHECKING

from features.errors import (
    AbsentClip,
    BadLocation,
    DamagedStore,
    FingerprintMismatch,
    OtherVersion,
    ShardOwned,
    StoreError,
)
from features.quarantine import Failure, QuarantineRecord
from features.spec import ArraySpec, Fingerprint, PatchTokens, StoreSpec, TextStates

if TYPE_CHECKING:
    from features.readahead import read_ahead
    from features.store import ShardWork, Store, create_store, open_store, store_exists

__all__ = [
    "AbsentClip",
    "ArraySpec",
    "BadLocation",
    "DamagedStore",
    "Failure",
    "Fingerprint",
    "FingerprintMismatch",
    "OtherVersion",
    "PatchTokens",
    "QuarantineRecord",
    "ShardOwned",
    "ShardWork",
    "Store",
    "StoreError",
    "StoreSpec",
    "TextStates",
    "create_store",
    "open_store",
    "read_ahead",
    "store_exists",
]

# torch and Zarr take seconds to import. `features.progress` has no use for them, so they come with the first of these.
_LATER = {
    "ShardWork": "features.store",
    "Store": "features.store",
    "create_store": "features.store",
    "open_store": "features.store",
    "read_ahead": "features.readahead",
    "store_exists": "features.store",
}

if not TYPE_CHECKING:  # mypy would believe in any name

    def __getattr__(name: str) -> object:
        if name not in _LATER:
            raise AttributeError(f"module 'features' has no attribute {name!r}")
        return getattr(import_module(_LATER[name]), name)
