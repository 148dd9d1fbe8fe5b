"""Models and tokenizers of the hub, without the minute of retries where it cannot be reached.

A model is called `NAME` or `NAME@REVISION`; a revision is a branch, a tag or a commit.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

import requests
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from egopatch.extract.encoders.checkpoints.checkpoint import CheckpointError
from egopatch.extract.encoders.checkpoints.folder import pickled_weights, refuse_pickle

REACH_S = 8.0
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class HubModel:
    """A model's name on the hub, and its revision; a revision of None is the main branch."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def parse_hub_model(model: str) -> HubModel | None:
    """The model that the hub may have under this name; None if the name is not valid on the hub."""
    name, at, revision = model.partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if at and not revision else HubModel(name, revision or None)


def why_unreachable() -> str | None:
    """Why the hub cannot be reached, as part of a sentence; None if it answers, whatever the answer."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answered = threading.Event()

    def ask() -> None:
        try:
            requests.head(constants.ENDPOINT, timeout=REACH_S)
            answered.set()
        except requests.RequestException:
            pass

    # In a thread, because looking the host's name up has a time limit of its own, which may be half a minute.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_S)
    return None if answered.is_set() else f"{constants.ENDPOINT} cannot be reached"


def download_folder(model: HubModel) -> Path:
    """The folder of a model in the hub's cache; missing files are downloaded, but never pickled ones.

    Raises:
        CheckpointError: The hub does not have the model or the revision, or cannot be reached and the cache lacks it;
            or its weights are pickled.
    """
    offline = why_unreachable()
    try:
        folder = Path(
            snapshot_download(
                model.name, revision=model.revision, allow_patterns=_FILES, local_files_only=offline is not None
            )
        )
        pickled = None
        if offline is None and not any(folder.glob("*.safetensors")):
            pickled = pickled_weights(HfApi().list_repo_files(model.name, revision=model.revision))
    except Exception as error:  # the hub's client raises many types, none of which needs a traceback
        raise CheckpointError(f"{model} is not a folder here, and {_why_not(model, offline, error)}") from error
    if pickled is not None:
        raise refuse_pickle(f"{model}, on the hub,", pickled)
    return folder


def _why_not(model: HubModel, offline: str | None, error: Exception) -> str:
    if offline is not None:
        found = "only in part" if isinstance(error, IncompleteSnapshotError) else "not"
        revision = "" if model.revision is None else f" --revision {model.revision}"
        return (
            f"{found} in the hub's cache {constants.HF_HUB_CACHE}, and {offline}; run `hf download "
            f"{model.name}{revision}` on a machine that reaches the hub and copy its cache here, or name the model's "
            "folder"
        )
    if isinstance(error, GatedRepoError):
        return "its owners restrict access to it on the hub; request access on its page, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no model of this name; check the spelling, or run `hf auth login` if it is private"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub's {model.name} has no revision {model.revision!r}; expected a branch, a tag or a commit"
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"it cannot be downloaded from the hub ({reason})"
