"""`encoder.arch: hf`: the vision and video models of transformers, from a folder or by their name on the hub.

`encoder.checkpoint` is the video model: its folder, or `NAME` or `NAME@REVISION` on the hub. `text.model` is the text
model and its tokenizer: the same folder for CLIP or SigLIP, the folder of any other text model, or the packaged
sentence network. The models are in `hf_models`, which this file imports only when it loads one, because transformers
takes seconds to import.
"""

from pathlib import Path

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.checkpoints.folder import open_folder, read_transform
from egopatch.extract.encoders.checkpoints.package import MINILM_REMEDY, text_folder
from egopatch.extract.encoders.layers.text_encoder import TextEncoder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.encoders.networks.network import Network, VideoOptions


def model_folder(model: Path | str) -> Path:
    """The folder of `model`: itself, or the folder in the hub's cache if it is the name of a model on the hub.

    Raises:
        CheckpointError: The folder is missing and is not a possible name on the hub; or as for
            `hub.download_folder`.
    """
    folder = Path(model)
    if folder.exists():
        return folder
    # Imported here to save start-up time.
    from egopatch.extract.encoders.networks.hub import download_folder, parse_hub_model

    named = parse_hub_model(str(model))
    if named is None:
        raise CheckpointError(
            f"{model} does not exist; expected a model's folder, or its name on the hub: NAME or NAME@REVISION"
        )
    return download_folder(named)


def build_video(checkpoint: Checkpoint, options: VideoOptions) -> VideoEncoder:
    """The vision or video model; see `hf_models.vision.build_video`."""
    from egopatch.extract.encoders.networks.hf_models import vision

    return vision.build_video(checkpoint, options)


def build_text(checkpoint: Checkpoint, depth: int) -> TextEncoder:
    """The text model; see `hf_models.text.build_text`."""
    from egopatch.extract.encoders.networks.hf_models import text

    return text.build_text(checkpoint, depth)


def text_weights(model: str) -> Path:
    """The folder of the model that `text.model` names.

    Raises:
        CheckpointError, ConfigError: As `model_folder` and `text_folder`.
    """
    folder = text_folder(model)
    try:
        return model_folder(folder)
    except CheckpointError as error:
        raise CheckpointError(f"text.model: {error}; {MINILM_REMEDY}") from error


NETWORK = Network(
    "hf",
    build_video,
    build_text,
    transform=read_transform,
    text_weights=text_weights,
    open_checkpoint=open_folder,
    locate=model_folder,
)
