"""`encoder.arch: imported`: features that another program wrote, in a store of `egopatch features import`.

There is no video network. As with `hf`, any text model of transformers or the packaged sentence network reads the
questions.
"""

from egopatch.configs.schema import ConfigError
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint
from egopatch.extract.encoders.checkpoints.folder import open_folder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.encoders.networks import hf
from egopatch.extract.encoders.networks.network import Network, VideoOptions


def no_video(checkpoint: Checkpoint | None = None, options: VideoOptions | None = None) -> VideoEncoder:
    """Refuse to load a video network.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError(
        "encoder.arch is imported: the clips come from `egopatch features import`, and there is no video network to "
        "encode others; `egopatch extract run` encodes the questions"
    )


NETWORK = Network(
    "imported",
    no_video,
    hf.build_text,
    text_weights=hf.text_weights,
    open_checkpoint=open_folder,
    locate=hf.model_folder,
)
