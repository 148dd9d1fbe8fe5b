"""Fingerprints of the clip store and of the text substore: everything in a config that decides the stored values."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from egopatch.configs.schema import Config
from egopatch.extract.encoders.checkpoints.package import MINILM, text_folder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.encoders.networks.network import Network
from egopatch.extract.video.transforms import Transform
from egopatch.features import Fingerprint
from egopatch.features.values.spec import Scalar, unscaled_dtype


def video_fingerprint(
    config: Config, network: Network, encoder: VideoEncoder, transform: Transform, checkpoint_sha256: str
) -> Fingerprint:
    """Fingerprint of the clips' tokens; `network` is the one that `encoder.arch` names."""
    package = network.package if config.encoder.checkpoint is None else None
    return Fingerprint(
        {
            **configured(config),
            "checkpoint": checkpoint_sha256,
            **({} if package is None else {"package": package.version}),
            **({} if network.plugin is None else {"plugin": network.plugin}),
            **encoder.identity,
            "transform": transform.name,
            "stored_dtype": config.store.dtype,
            "decoder": f"{'nvdec, ' if config.video.decoder == 'nvdec' else ''}pyav {version('av')}",
        }
    )


def configured(config: Config) -> dict[str, Scalar]:
    """The fields of a clip store's fingerprint that the config alone decides, on every machine."""
    encoder, video = config.encoder, config.video
    return {
        # Compiled code rounds differently. If false, it is left out, as in stores from before `compile` existed.
        **({"compile": True} if encoder.compile else {}),
        "arch": encoder.arch,
        **({"variant": encoder.variant} if encoder.arch == "mfas" else {}),
        "depth": encoder.depth,
        "path": encoder.path,
        "compute_dtype": encoder.dtype,
        "frames": video.frames,
        "size": video.size,
        "sampling": video.sampling,
        "short": video.short,
    }


def text_fingerprint(config: Config, network: Network, checkpoint_sha256: str) -> Fingerprint:
    """Fingerprint of the questions' states. Its `checkpoint`, if it has one, must equal that of the clips' tokens."""
    own_weights = network.text_weights is not None
    return Fingerprint(
        {
            "arch": config.encoder.arch,
            "text_checkpoint" if own_weights else "checkpoint": checkpoint_sha256,
            "depth": text_depth(config),
            "tokenizer": _tokenizer_digest(config.text.model),
            **({"package": MINILM.version} if config.text.model == MINILM.name else {}),
            "max_length": config.text.max_length,
            "compute_dtype": "float32",
            "stored_dtype": unscaled_dtype(config.store.dtype),
        }
    )


def _tokenizer_digest(model: str) -> str:
    folder = Path(text_folder(model))
    if not folder.is_dir():
        return f"hub {model}"
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def text_depth(config: Config) -> int:
    """Number of text layers that run before the states are stored."""
    return config.encoder.depth if config.text.depth is None else config.text.depth
