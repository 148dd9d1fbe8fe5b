"""The store of precomputed features, which stage one writes and stage two reads.

Rooms, lowest first: `common`, `values`, `io`, `storage`, `formats`, `state`, `store`, `tools`. Users import the names
below; `docs/store.md` describes the files.
"""

if __name__ == "features":  # the short name, in a checkout; first, so that Ctrl-C is soon silent
    from egopatch import short_names

    short_names.alias(__name__)

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from egopatch.features.state.quarantine import Failure, QuarantineRecord
    from egopatch.features.store.create import create_store
    from egopatch.features.store.pixels import to_pixels
    from egopatch.features.store.read_ahead import read_ahead
    from egopatch.features.store.store import ShardWork, Store, open_store, store_exists
    from egopatch.features.store.torch_dataset import torch_dataset
    from egopatch.features.values.errors import (
        AbsentClip,
        BadLocation,
        DamagedStore,
        FingerprintMismatch,
        OtherVersion,
        ShardOwned,
        StoreError,
    )
    from egopatch.features.values.spec import ArraySpec, Fingerprint, PatchTokens, StoreSpec, TextStates

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
    "to_pixels",
    "torch_dataset",
]

# torch and Zarr take seconds to import, NumPy a part of one, and a command line needs none of them before it knows its
# command: every name is imported on first use.
_ROOMS = {
    "state.quarantine": ("Failure", "QuarantineRecord"),
    "store.create": ("create_store",),
    "store.pixels": ("to_pixels",),
    "store.read_ahead": ("read_ahead",),
    "store.store": ("ShardWork", "Store", "open_store", "store_exists"),
    "store.torch_dataset": ("torch_dataset",),
    "values.errors": (
        "AbsentClip",
        "BadLocation",
        "DamagedStore",
        "FingerprintMismatch",
        "OtherVersion",
        "ShardOwned",
        "StoreError",
    ),
    "values.spec": ("ArraySpec", "Fingerprint", "PatchTokens", "StoreSpec", "TextStates"),
}

if not TYPE_CHECKING:  # with this function, mypy would accept any name

    def __getattr__(name: str) -> object:
        for room, names in _ROOMS.items():
            if name in names:
                return getattr(import_module(f"egopatch.features.{room}"), name)
        raise AttributeError(f"module 'features' has no attribute {name!r}")
