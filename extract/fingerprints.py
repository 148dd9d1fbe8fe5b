"""What decides the values in a store, gathered from a config: the two halves' fingerprints."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from configs.schema import Config
from extract.encoders import Tokenizer
from extract.transforms import TRANSFORM
from features import Fingerprint


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def video_fingerprint(config: Config, checkpoint_sha256: str) -> Fingerprint:
    """Fingerprint of the clips' tokens."""
    encoder, video = config.encoder, config.video
    return Fingerprint(
        {
            "arch": encoder.arch,
            "checkpoint": checkpoint_sha256,
            "depth": encoder.depth,
            "path": encoder.path,
            "compute_dtype": encoder.dtype,
            "frames": video.frames,
            "size": video.size,
            "sampling": video.sampling,
            "short": video.short,
            "transform": TRANSFORM,
            "stored_dtype": config.store.dtype,
            "decoder": f"decord2 {version('decord2')}",
        }
    )


def text_fingerprint(config: Config, checkpoint_sha256: str, tokenizer: Tokenizer) -> Fingerprint:
    """Fingerprint of the questions' states."""
    return Fingerprint(
        {
            "arch": config.encoder.arch,
            "checkpoint": checkpoint_sha256,
            "depth": text_depth(config),
            "tokenizer": tokenizer.digest,
            "max_length": config.text.max_length,
            "compute_dtype": "float32",
            "stored_dtype": config.store.dtype,
        }
    )


def text_depth(config: Config) -> int:
    """Text layers run before the states are cached."""
    return config.encoder.depth if config.text.depth is None else config.text.depth
