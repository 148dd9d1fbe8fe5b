"""Values that both halves of a network read from its checkpoint: the text network's depth and the joint projections."""

import re

from torch import nn

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint

# Where each network's checkpoint keeps the layers of its text network.
TEXT_LAYERS = {
    "egovlp": "text_model.transformer.layer",
    "egovlpv2": "text_model.encoder.layer",
    "mfas": "text_model.encoder.layer",
    "bert": "encoder.layer",
}


def text_layers(checkpoint: Checkpoint) -> int:
    """Number of layers of the checkpoint's text network; 0 if it has none."""
    root = TEXT_LAYERS.get(checkpoint.network or "")
    return 0 if root is None else checkpoint.count(rf"{re.escape(root)}\.(\d+)\.")


def projection_layers(checkpoint: Checkpoint, name: str) -> nn.Sequential:
    """EgoVLPv2's three-layer projection `name` into the joint space, not yet filled.

    Raises:
        CheckpointError: The checkpoint has no such projection.
    """
    joint, width = checkpoint.shape(f"{name}.0.weight", 2)
    return nn.Sequential(
        nn.Linear(width, joint, bias=False), nn.ReLU(), nn.Linear(joint, joint), nn.ReLU(), nn.Linear(joint, joint)
    )
