"""Finds a network by its name, `encoder.arch`, and loads its encoders.

`NETWORKS` lists the networks of this package. Others come from `register_encoder`, and from the entry points
`egopatch.encoders` of installed packages, each of which is a `Network`.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import get_args

import torch

from egopatch.configs.plugins import Plugins, call_fault, traceback_kept
from egopatch.configs.schema import ConfigError
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.layers.compiling import compile_encoder
from egopatch.extract.encoders.layers.returned import check_states, check_tokens
from egopatch.extract.encoders.layers.text_encoder import TextEncoder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.extract.encoders.networks import egovlp, egovlpv2, hf, imported, lite, mfas
from egopatch.extract.encoders.networks.network import Network, SaliencyKind, Variant, VideoOptions, VideoPath
from egopatch.extract.video.transforms import Transform

NETWORKS: dict[str, Network] = {
    "egovlp": egovlp.NETWORK,
    "egovlpv2": egovlpv2.NETWORK,
    "hf": hf.NETWORK,
    "imported": imported.NETWORK,
    "lite": lite.NETWORK,
    "mfas": mfas.NETWORK,
}


# The functions of a network, with their arguments, and those that may be None.
_CALLS = {
    "build_video": ("checkpoint", "options"),
    "build_text": ("checkpoint", "depth"),
    "transform": ("checkpoint", "size"),
    "text_weights": ("model",),
    "open_checkpoint": ("path",),
    "locate": ("path",),
}
_OPTIONAL = ("text_weights", "locate")


def _fault(name: str, network: object) -> str | None:
    if not isinstance(network, Network):
        return f"is of type {type(network).__name__}; expected an extract.encoders.Network"
    if network.name != name:
        return f"is a Network called {network.name!r}; expected the same name"
    for field, arguments in _CALLS.items():
        given = getattr(network, field)
        absent = given is None and field in _OPTIONAL
        if not (absent or isinstance(given, Transform)) and (fault := call_fault(given, *arguments)):
            return f"is a Network whose {field} {fault}" + (", or a Transform" if field == "transform" else "")
    return None


_PLUGINS: Plugins[Network] = Plugins("encoder.arch", "egopatch.encoders", NETWORKS.keys(), _fault)


def register_encoder(network: Network, replace: bool = False) -> None:
    """Make `network` available by its name as `encoder.arch`, in this process and in the workers that it starts.

    Args:
        network: The network; its functions reach worker processes even if they are defined in a notebook.
        replace: Whether to replace what an earlier call registered under the name.

    Raises:
        ConfigError: The name is taken, or `network` is not a `Network`.
    """
    if not isinstance(network, Network):
        raise ConfigError(f"register_encoder was given {network!r}, which {_fault('', network)}")
    _PLUGINS.register(network.name, network, replace)


def find_network(arch: str) -> Network:
    """The network called `arch`.

    Raises:
        ConfigError: No network has that name, or a package that registers it is broken.
    """
    network = _PLUGINS.find(arch)
    if network is None:
        return NETWORKS[arch]
    return dataclasses.replace(network, plugin=_PLUGINS.package_of(arch))


def weights_path(arch: str | Network, path: Path | None) -> Path:
    """File or folder with the weights of `arch`: the one that `path` names, or the file in the installed package.

    Raises:
        CheckpointError: `path` is the name of a model on the hub, and the hub does not provide it.
        ConfigError: `arch` is unknown; or `path` is None and no package with the weights exists or is installed.
    """
    network = _network_of(arch)
    if path is not None:
        if network.locate is None:
            return path
        with _own_code(network):
            return network.locate(path)
    if network.package is None:
        raise ConfigError(
            f"encoder.checkpoint is not set, and no package provides the weights of {network.name}; "
            "set it to the path of the checkpoint"
        )
    return network.package.locate()


def open_checkpoint(arch: str | Network, path: Path | None) -> Checkpoint:
    """Read the weights of the video network `arch` (and of its text network, if one file holds both).

    Args:
        arch: Name of the network, or what `find_network` returned for it.
        path: Path of the file; None reads the weights from the installed package.

    Raises:
        CheckpointError: As for `load_checkpoint`.
        ConfigError: As for `weights_path`.
    """
    network = _network_of(arch)
    return _opened(network, weights_path(network, path))


def open_text_checkpoint(arch: str | Network, video: Checkpoint | None, model: str) -> Checkpoint:
    """Read the weights of the text network that goes with `arch`.

    Args:
        arch: Name of the network, or what `find_network` returned for it.
        video: Checkpoint of the video network, returned if it holds the text network too; None if there is none.
        model: Value of `text.model`.

    Raises:
        CheckpointError, ConfigError: As for `open_checkpoint`.
    """
    network = _network_of(arch)
    if network.text_weights is None:
        assert video is not None
        return video
    with _own_code(network):
        file = network.text_weights(model)
    return _opened(network, file)


def input_transform(arch: str | Network, path: Path | None, size: int) -> Transform:
    """The transform from decoded frames to the input of the video network `arch`.

    Args:
        arch: Name of the network, or what `find_network` returned for it.
        path: `encoder.checkpoint`.
        size: Side of the input in pixels.

    Raises:
        CheckpointError, ConfigError: As for `open_checkpoint`; or a network from outside this package returns another
            object.
    """
    network = _network_of(arch)
    if isinstance(network.transform, Transform):
        return network.transform
    weights = weights_path(network, path)
    with _own_code(network):
        transform = network.transform(weights, size)
    if not isinstance(transform, Transform):
        raise ConfigError(
            f"encoder.arch is {network.name!r}, but its transform returns a {type(transform).__name__}; expected an "
            "extract.video.transforms.Transform"
        )
    return transform


def load_video_encoder(
    arch: str | Network,
    checkpoint: Path | str | Checkpoint | None,
    num_frames: int = 16,
    depth: int = 6,
    path: VideoPath = "fused",
    dtype: torch.dtype = torch.float32,
    variant: Variant = "paper",
    size: int | None = None,
    compile: torch.device | None = None,
    saliency: SaliencyKind = "auto",
) -> VideoEncoder:
    """Load a video network, frozen and in evaluation mode, on the CPU.

    Args:
        arch: Name of the network, or what `find_network` returned for it.
        checkpoint: Path of the file, or a checkpoint already read; None reads the installed package (lite).
        num_frames: T, frames of a clip.
        depth: Number of blocks to run; after the last block, tokens include the final norm.
        path: EgoVLPv2 only: `fused` is the question-answering half-network, `dual` the video-only network.
        dtype: Data type of weights and arithmetic.
        variant: MFAS only: `paper`, or `released` with the quirks of the released code; see
            `extract.encoders.networks.mfas`.
        size: Side of the input in pixels; None uses the size that the checkpoint takes.
        compile: Device to compile the network for with `torch.compile`, whose first clips then take minutes longer;
            None does not compile.
        saliency: hf only: `cls`, `norm` or `attention`; see `extract.encoders.networks.hf_models.vision`.

    Raises:
        CheckpointError: The checkpoint is unreadable, another network's, incomplete, or takes another size.
        ConfigError: `arch` is unknown or builds no complete `VideoEncoder`, a package is not installed, or
            `torch.compile` does not work here. The `forward` of an encoder from outside this package raises it too, if
            its own code does not return `PatchTokens` of the shapes that the encoder promises.
        RuntimeError: Code of an encoder from outside this package, `forward` included, raises another ValueError or
            OSError.
        ValueError: `path` or `variant` is unknown, or `num_frames` is below 1.
    """
    network = _network_of(arch)
    if path not in get_args(VideoPath):
        raise ValueError(f"path is {path!r}; expected fused or dual")
    if variant not in get_args(Variant):
        raise ValueError(f"variant is {variant!r}; expected paper or released")
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")
    loaded = (
        checkpoint
        if isinstance(checkpoint, Checkpoint)
        else open_checkpoint(network, None if checkpoint is None else Path(checkpoint))
    )
    with _own_code(network):
        encoder = network.build_video(loaded, VideoOptions(num_frames, depth, path, dtype, variant, size, saliency))
    if not isinstance(encoder, VideoEncoder):
        raise ConfigError(
            f"encoder.arch is {network.name!r}, but its build_video returns a {type(encoder).__name__}; "
            "expected an extract.encoders.VideoEncoder"
        )
    if network.name not in NETWORKS:
        check_tokens(network.name, encoder)
        if encoder.num_frames != num_frames:
            raise ConfigError(
                f"video.frames is {num_frames}, but the {type(encoder).__name__} of the encoder {network.name} takes "
                f"{encoder.num_frames}; set video.frames to {encoder.num_frames}, or let build_video pass on "
                "options.num_frames"
            )
    if size is not None and encoder.size != size:
        raise CheckpointError(
            f"video.size is {size}, but {loaded.path} takes frames of {encoder.size} pixels; set video.size to "
            f"{encoder.size}"
        )
    return encoder if compile is None else compile_encoder(encoder, compile)


def load_text_encoder(arch: str | Network, checkpoint: Path | str | Checkpoint, depth: int = 6) -> TextEncoder:
    """Load a text network, frozen and in evaluation mode, on the CPU in float32.

    Args:
        arch: Name of the network, or what `find_network` returned for it.
        checkpoint: Path of the file, or a checkpoint already read; see `open_text_checkpoint`.
        depth: Number of layers to run.

    Raises:
        CheckpointError, ConfigError: As for `load_video_encoder`.
    """
    network = _network_of(arch)
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else _opened(network, Path(checkpoint))
    with _own_code(network):
        encoder = network.build_text(loaded, depth)
    if not isinstance(encoder, TextEncoder):
        raise ConfigError(
            f"encoder.arch is {network.name!r}, but its build_text returns a {type(encoder).__name__}; "
            "expected an extract.encoders.TextEncoder"
        )
    if network.name not in NETWORKS:
        check_states(network.name, encoder)
    return encoder


def _network_of(arch: str | Network) -> Network:
    return find_network(arch) if isinstance(arch, str) else arch


def _opened(network: Network, file: Path) -> Checkpoint:
    with _own_code(network):
        return network.open_checkpoint(file)


def _own_code(network: Network) -> AbstractContextManager[None]:
    """See `traceback_kept`; errors of this package's own networks stay one line."""
    return nullcontext() if network.name in NETWORKS else traceback_kept(f"the encoder {network.name}")
