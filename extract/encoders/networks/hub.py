"""Tokenizers of the hub, without the minute of retries where it cannot be reached."""

import threading

import requests
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, validate_repo_id

REACH_S = 8.0


def is_hub_name(model: str) -> bool:
    """Whether the hub can have a model of this name."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def why_unreachable() -> str | None:
    """Why the hub cannot be asked, as part of a sentence; None where it answers, whatever it says."""
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
