"""Text models of transformers, from their folder, and the text half of CLIP and SigLIP models."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.checkpoints.folder import FolderCheckpoint
from egopatch.extract.encoders.layers.text_encoder import TextEncoder
from egopatch.extract.encoders.layers.video_encoder import check_depth
from egopatch.extract.encoders.networks.hf_models.loading import load_model


class HfTextEncoder(TextEncoder):
    """A text model of transformers."""

    def __init__(self, model: PreTrainedModel, width: int, depth: int, layers: int) -> None:
        super().__init__(model, width, depth, None)
        self._last = depth == layers
        # SigLIP was trained on padded texts without a mask.
        self._masked = model.config.model_type != "siglip_text_model"

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `TextEncoder.forward`; the last layer's states carry the final norm, where the model has one."""
        mask = attention_mask.long() if self._masked else None
        output = self.model(input_ids=input_ids, attention_mask=mask, output_hidden_states=not self._last)
        return output.last_hidden_state if self._last else output.hidden_states[self.depth]


def build_text(checkpoint: Checkpoint, depth: int) -> TextEncoder:
    """The text model in a folder, or the text half of a CLIP or SigLIP model, down to layer `depth`.

    Raises:
        CheckpointError: The folder has no text model, its weights are incomplete, or it has fewer layers.
    """
    assert isinstance(checkpoint, FolderCheckpoint)
    model = load_model(checkpoint, torch.float32, eager=False)
    if hasattr(model, "text_model"):
        model = model.text_model
    elif model.config.is_encoder_decoder:
        model = model.get_encoder()
    if not hasattr(model.config, "vocab_size") or model.main_input_name != "input_ids":
        kind = model.config.model_type
        raise CheckpointError(f"{checkpoint.path} is a {kind} model; text.model expects a text model")
    layers = int(model.config.num_hidden_layers)
    check_depth(depth, layers, "the number of its text layers (text.depth)", checkpoint)
    return HfTextEncoder(model, int(model.config.hidden_size), depth, layers)
