"""The substore for question texts: a store of the texts' states, in the folder `text` of a store of clips."""

from typing import TYPE_CHECKING

from egopatch.features.storage.interface import Storage
from egopatch.features.values.errors import FingerprintMismatch
from egopatch.features.values.spec import Fingerprint

if TYPE_CHECKING:  # see `features`
    from egopatch.features.store.store import Store

TEXT_FOLDER = "text"
_NETWORK_FIELDS = ("arch", "checkpoint")  # fields that name the network, in both fingerprints


def substores(storage: Storage) -> list[str]:
    """Folders of the stores at `storage`, relative to it: the store itself, and its text substore if it has one."""
    return ["", TEXT_FOLDER] if storage.exists(TEXT_FOLDER) else [""]


def network_differences(clips: Fingerprint, texts: Fingerprint) -> list[str]:
    """One line for each network field in which clips and texts differ; fields that only one of them has are skipped."""
    shared = [name for name in _NETWORK_FIELDS if name in clips.fields and name in texts.fields]
    clips_network = Fingerprint({name: clips.fields[name] for name in shared})
    texts_network = Fingerprint({name: texts.fields[name] for name in shared})
    return clips_network.differences(texts_network, "clips have", "texts have")


def require_same_network(clips: "Store", texts: "Store") -> None:
    """Refuse clips and texts from two networks, whose features cannot be combined.

    Raises:
        FingerprintMismatch: The networks differ; the message names the differing fields.
    """
    if different := network_differences(clips.fingerprint, texts.fingerprint):
        raise FingerprintMismatch(
            f"the clips in {clips.path} and the texts in {texts.path} were encoded with different networks "
            f"({'; '.join(different)}); move {texts.path} away and encode the texts again with `egopatch extract run`"
        )
