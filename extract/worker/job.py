"""A resolved config, with all that encoding needs: the network, its weights, the device and the store's layout.

Every command resolves its config once and passes the result on. Worker processes receive the config and resolve it
again themselves, because loading an encoder from its file is faster than sending it to another process.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from egopatch.configs.schema import Config
from egopatch.extract.encoders import (
    Checkpoint,
    VideoEncoder,
    find_network,
    input_transform,
    load_video_encoder,
    open_checkpoint,
    weights_path,
)
from egopatch.extract.encoders.networks import imported
from egopatch.extract.encoders.networks.network import Network
from egopatch.extract.feed.clips import PreparedClip
from egopatch.extract.feed.decoders import open_decoders
from egopatch.extract.feed.pixels import FrameKind
from egopatch.extract.feed.pool import DecodePool
from egopatch.extract.fingerprints import video_fingerprint
from egopatch.extract.video.nvdec import require_gpu_decoder
from egopatch.extract.video.transforms import Transform
from egopatch.extract.worker.batch_encoder import BatchEncoder
from egopatch.extract.worker.device import device_of
from egopatch.extract.worker.on_cores import CoreEncoder
from egopatch.extract.worker.on_device import DeviceEncoder
from egopatch.extract.writing.shard_writer import shards_at_once
from egopatch.features import Fingerprint, StoreSpec
from egopatch.features.common.units import counted


@dataclass(frozen=True)
class ExtractionJob:
    """A resolved config.

    Attributes:
        config: The experiment; `encoder.checkpoint` is a path, even if it was a name on the hub.
        network: The network that `encoder.arch` names.
        device: Device of the encoders.
        checkpoint: Weights of the video network.
        encoder: Frozen video encoder in evaluation mode, on the CPU until `open_batch_encoder` moves it.
        transform: Turns decoded frames into the encoder's input.
    """

    config: Config
    network: Network
    device: torch.device
    checkpoint: Checkpoint
    encoder: VideoEncoder
    transform: Transform

    # Both are computed at first use: a worker needs neither, and a fingerprint hashes the whole checkpoint file.
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

    @property
    def encodes_on_device(self) -> bool:
        """Whether a device transforms and encodes clips, rather than this machine's cores."""
        return self.device.type != "cpu"

    @property
    def frame_kind(self) -> FrameKind:
        """The frames that the encoder takes."""
        return FrameKind(self.config.video.size, self.transform, planes=self.encodes_on_device)

    @property
    def frames_line(self) -> str | None:
        """One line of advice if clips have more frames than the checkpoint has positions for; else None."""
        trained, frames = self.encoder.trained_frames, self.encoder.num_frames
        if trained is None or frames <= trained:
            return None
        return (
            f"{self.checkpoint.path} has positions for {counted(trained, 'frame')}, but video.frames is {frames}: the "
            f"positions of the other frames are filled in as its authors do; --video.frames {trained} uses only those "
            "of the file"
        )

    def open_batch_encoder(self) -> BatchEncoder:
        """Move the encoder to its device, and open it for batches of `encoder.batch`."""
        encoder, config = self.encoder.to(self.device), self.config
        if self.encodes_on_device:
            capture = not config.encoder.compile  # a compiled encoder needs few launches
            batch = config.encoder.batch
            # Batches of the shards being written, of the one that waits for that and of the one being gathered.
            in_use = (shards_at_once() + 2) * -(-config.store.shard // batch) + 2
            return DeviceEncoder(encoder, batch, config.store.dtype, self.transform, in_use, capture)
        return CoreEncoder(encoder, config.encoder.batch, config.store.dtype, self.transform)

    def open_decoders(self, count: int, clips: int) -> DecodePool[PreparedClip]:
        """`count` child processes that decode for the encoder; at most `clips` clips are not yet released at a time."""
        return open_decoders(self.config.video, [self.frame_kind], count, clips)


def resolve_job(config: Config, device: str | None = None, network: Network | None = None) -> ExtractionJob:
    """Look up what `config` names and load the video encoder.

    Args:
        config: The experiment.
        device: Device to use instead of `encoder.device`.
        network: The network that `encoder.arch` names, if already known: a worker process receives it, because it may
            have been registered only in the process that started the job.

    Raises:
        CheckpointError: The file is not a checkpoint of `encoder.arch`, or takes another `video.size`.
        ConfigError: The network or the device does not exist, or `encoder.compile` finds no compiler.
        JobFailed: `encoder.compile` finds the GPU without free memory.
    """
    # The cheap look-ups come first: a misspelled name is reported before any file is read.
    network = network or find_network(config.encoder.arch)
    if network is imported.NETWORK:
        imported.no_video()
    torch_device = device_of(device or config.encoder.device)
    if config.video.decoder == "nvdec":
        require_gpu_decoder()
    if config.encoder.checkpoint is not None:
        # A name on the hub may mean another revision by the time that a worker looks it up.
        located = weights_path(network, config.encoder.checkpoint)
        config = replace(config, encoder=replace(config.encoder, checkpoint=located))
    checkpoint = open_checkpoint(network, config.encoder.checkpoint)
    encoder = load_video_encoder(
        network,
        checkpoint,
        num_frames=config.video.frames,
        depth=config.encoder.depth,
        path=config.encoder.path,
        size=config.video.size,
        dtype=getattr(torch, config.encoder.dtype),
        compile=torch_device if config.encoder.compile else None,
        variant=config.encoder.variant,
        saliency=config.encoder.saliency,
    )
    transform = input_transform(network, config.encoder.checkpoint, config.video.size)
    return ExtractionJob(config, network, torch_device, checkpoint, encoder.eval(), transform)
