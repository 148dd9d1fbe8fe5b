"""A config with everything looked up that encoding needs: the network, its weights, the device and the store's layout.

Every command resolves its config once and hands the result on. Worker processes receive the config and resolve it again
on their side, because an encoder is loaded faster from its file than it is sent to another process.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import torch

from egopatch.configs.schema import Config
from egopatch.extract.encoders import (
    Checkpoint,
    VideoEncoder,
    find_network,
    input_transform,
    load_video_encoder,
    open_checkpoint,
)
from egopatch.extract.encoders.networks.network import Network
from egopatch.extract.fingerprints import video_fingerprint
from egopatch.extract.video.decode import DecodePool, PreparedClip, prepare_clip
from egopatch.extract.video.transforms import Transform
from egopatch.extract.worker.device import device_of
from egopatch.features import Fingerprint, StoreSpec


@dataclass(frozen=True)
class ExtractionJob:
    """A resolved config.

    Attributes:
        config: The experiment.
        network: The network that `encoder.arch` names.
        device: Device of the encoders.
        checkpoint: Weights of the video network.
        encoder: Frozen video encoder on `device`, in evaluation mode.
        transform: Turns decoded frames into the encoder's input.
    """

    config: Config
    network: Network
    device: torch.device
    checkpoint: Checkpoint
    encoder: VideoEncoder
    transform: Transform

    # Both wait for their first use: a worker needs neither, and a fingerprint hashes the whole checkpoint file.
    @cached_property
    def spec(self) -> StoreSpec:
        """Arrays of the store that holds the encoder's tokens."""
        return StoreSpec.for_patches(
            frames=self.encoder.steps,
            grid=self.encoder.grid,
            width=self.encoder.width,
            dtype=self.config.store.dtype,
            shard=self.config.store.shard,
            codec=self.config.store.codec,
            coarse=self.encoder.coarse,
            coarse_width=self.encoder.coarse_width,
        )

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of that store."""
        return video_fingerprint(self.config, self.network, self.encoder, self.transform, self.checkpoint.sha256)

    def open_decoders(self, count: int) -> DecodePool[PreparedClip]:
        """`count` child processes that decode clips and apply the transform that the network was trained with."""
        return DecodePool(self.config.video, count, partial(prepare_clip, transform=self.transform))


def resolve_job(config: Config, device: str | None = None, network: Network | None = None) -> ExtractionJob:
    """Look up what `config` names and load the video encoder.

    Args:
        config: The experiment.
        device: Device to use instead of `encoder.device`.
        network: The network that `encoder.arch` names, where it is known already: a worker process receives it, because
            a call may have registered it in the process that started the job.

    Raises:
        CheckpointError: The file is not a checkpoint of `encoder.arch`, or was trained on another `video.size`.
        ConfigError: The network or the device does not exist, or `encoder.compile` finds no compiler.
    """
    # The cheap look-ups come first: a misspelled name is reported before any file is read.
    network = network or find_network(config.encoder.arch)
    torch_device = device_of(device or config.encoder.device)
    checkpoint = open_checkpoint(network, config.encoder.checkpoint)
    encoder = load_video_encoder(
        network,
        checkpoint,
        num_frames=config.video.frames,
        depth=config.encoder.depth,
        path=config.encoder.path,
        size=config.video.size,
        compile=config.encoder.compile,
        dtype=getattr(torch, config.encoder.dtype),
        variant=config.encoder.variant,
        saliency=config.encoder.saliency,
    )
    transform = input_transform(network, config.encoder.checkpoint, config.video.size)
    return ExtractionJob(config, network, torch_device, checkpoint, encoder.to(torch_device).eval(), transform)
