"""Loads a model of transformers from its folder, and refuses one whose weights or tokens this project cannot use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError, list_some
from egopatch.extract.encoders.checkpoints.folder import FolderCheckpoint

# Parts of a model that do not affect the tokens; their weights may be missing.
_UNUSED = ("pooler", "predictor", "head", "mask_token", "logit_", "text_model", "visual_projection", "text_projection")
_VARIABLE = "its patches follow the shape of each image and form no fixed grid"
NO_GRID = "its tokens form no grid of patches"
REFUSED = {
    "siglip2": _VARIABLE,
    "siglip2_vision_model": _VARIABLE,
    "pe_video": NO_GRID,
    "pe_video_encoder": NO_GRID,
    "pe_audio_video": NO_GRID,
}


def load_model(checkpoint: FolderCheckpoint, dtype: torch.dtype, eager: bool) -> PreTrainedModel:
    """The whole model of a folder; no code of the folder runs.

    Args:
        checkpoint: The folder.
        dtype: Dtype of the weights.
        eager: Whether attention is computed so that its weights can be read.

    Raises:
        CheckpointError: transformers cannot load the model, its weights are incomplete or another model's, or as in
            `require_fixed_grid`.
    """
    folder = checkpoint.path
    kind = checkpoint.settings["model_type"]
    require_fixed_grid(checkpoint, kind)
    try:
        with _quiet():
            model, info = AutoModel.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                config=AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
                **({"attn_implementation": "eager"} if eager else {}),
            )
    except Exception as error:  # transformers and safetensors raise many types over a bad folder
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        raise CheckpointError(f"{folder}: transformers cannot load this {kind} model ({reason[:200]})") from error
    wrong = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    missing = [name for name in info["missing_keys"] if not any(part in name for part in _UNUSED)]
    if missing or wrong:
        fault = f"lack {list_some(sorted(missing))}" if missing else f"have other shapes: {list_some(sorted(wrong))}"
        raise CheckpointError(
            f"{folder}: the weights {fault}; they belong to a different model than config.json describes"
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing its loading report; the code here checks what it would report."""
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def require_fixed_grid(checkpoint: Checkpoint, kind: str) -> None:
    """Refuse a `model_type` whose tokens form no fixed grid of patches.

    Raises:
        CheckpointError: They do not.
    """
    if kind in REFUSED:
        raise CheckpointError(
            f"{checkpoint.path} is a {kind} model: {REFUSED[kind]}; use another model, such as dinov2, clip, siglip or "
            "videomae"
        )
