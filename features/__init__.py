"""The store of precomputed features: the contract between stage one, which writes it, and stage two, which reads it."""

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
from features.readahead import read_ahead
from features.spec import ArraySpec, Fingerprint, PatchTokens, StoreSpec, TextStates
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
