"""`encoder.arch: hf`: the vision and video models of transformers, from a folder or by their name on the hub.

`encoder.checkpoint` is the video model. `text.model` is the text model and its tokenizer: the same folder where CLIP or
SigLIP is used, any other text model's, or the packaged sentence network. The models are in `hf_models`, which this file
imports when one is loaded, because transformers takes seconds to import.
"""

from pathlib import Path

from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.checkpoints.folder import FolderCheckpoint, open_folder, read_transform
from egopatch.extract.encoders.checkpoints.package import text_folder
from egopatch.extract.encoders.layers.text_encoder import TextEncoder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.encoders.networks.network import Network, VideoOptions
from egopatch.extract.video.transforms import Transform

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def model_folder(model: Path | str) -> Path:
    """The folder of `model`: itself, or a copy of the hub's model of that name in the hub's cache.

    Raises:
        CheckpointError: The folder is missing, and the hub lacks the model or cannot be reached.
    """
    folder = Path(model)
    if folder.exists():
        return folder
    from huggingface_hub import snapshot_download

    from egopatch.extract.encoders.networks.hub import is_hub_name, why_unreachable

    if folder.is_absolute() or len(folder.parts) > 2 or not is_hub_name(str(model)):
        raise CheckpointError(f"{model} does not exist; expected a model's folder, or its name on the hub")
    offline = why_unreachable()
    try:
        return Path(snapshot_download(str(model), allow_patterns=_FILES, local_files_only=offline is not None))
    except Exception as error:  # the hub's client raises many types, none of which needs a traceback
        reason = offline or next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{model} is neither a folder here nor a model that the hub gave ({reason})") from error


def open_model(model: Path) -> FolderCheckpoint:
    """Read what a model folder holds, without its tensors; errors as for `model_folder` and `open_folder`."""
    return open_folder(model_folder(model))


def build_video(checkpoint: Checkpoint, options: VideoOptions) -> VideoEncoder:
    """The vision or video model; see `hf_models.build_video`."""
    from egopatch.extract.encoders.networks import hf_models

    return hf_models.build_video(checkpoint, options)


def build_text(checkpoint: Checkpoint, depth: int) -> TextEncoder:
    """The text model; see `hf_models.build_text`."""
    from egopatch.extract.encoders.networks import hf_models

    return hf_models.build_text(checkpoint, depth)


def transform(model: Path, size: int) -> Transform:
    """The preprocessing of the model's own processor; see `checkpoints.folder.read_transform`."""
    return read_transform(model_folder(model), size)


def text_weights(model: str) -> Path:
    """The folder that `text.model` names."""
    return Path(text_folder(model))


NETWORK = Network("hf", build_video, build_text, transform, None, text_weights, open_model)
