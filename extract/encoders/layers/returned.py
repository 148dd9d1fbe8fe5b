"""Checks at every batch what the encoders of a network from outside this package return.

Without this, an extra row would go unnoticed, and a value that is not a tensor would fail far from where it was made.
An error that their `forward` raises keeps its traceback.

Shape legend: B clips or texts, T' positions in time (`steps`), N patches a frame of D channels, L text tokens.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from egopatch.configs.plugins import call_fault, traceback_kept
from egopatch.configs.schema import ConfigError
from egopatch.extract.encoders.layers.text_encoder import TextEncoder
from egopatch.extract.encoders.layers.video_encoder import VideoEncoder
from egopatch.features.values.spec import Fingerprint, PatchTokens

Shapes = Mapping[str, tuple[int, ...]]


def check_tokens(name: str, encoder: VideoEncoder) -> None:
    """Make `forward` raise a ConfigError that names the encoder if it does not return what the attributes promise.

    Args:
        name: Name of the network, for messages.
        encoder: Its video encoder.

    Raises:
        ConfigError: An attribute that the encoder has to set is missing or of the wrong type, its `identity` does not
            fit in a fingerprint, or its `forward` does not take frames alone.
    """
    _require_attributes(name, encoder, "grid", "width", "depth", "num_frames", "size")
    try:
        Fingerprint(encoder.identity)
    except ValueError as error:
        raise ConfigError(
            f"the {type(encoder).__name__} of the encoder {name} has an identity that is not valid: {error}"
        ) from error
    _watch(f"the encoder {name}", encoder, partial(_require_tokens, name, encoder), "frames")


def check_states(name: str, encoder: TextEncoder) -> None:
    """As `check_tokens`, for the text encoder of the network."""
    _require_attributes(name, encoder, "width", "depth")
    _watch(f"the text half of the encoder {name}", encoder, partial(_require_states, name, encoder), "ids", "mask")


def _watch(whose: str, encoder: nn.Module, require: Callable[[Tensor, object], None], *inputs: str) -> None:
    if fault := call_fault(encoder.forward, *inputs):
        raise ConfigError(f"the forward of {whose} {fault}")
    # A hook could check what is returned, but not change what is raised.
    encoder.forward = partial(_forward, whose, encoder.forward, require)


def _forward(
    whose: str, forward: Callable[..., Any], require: Callable[[Tensor, object], None], *inputs: Tensor, **named: Tensor
) -> Any:
    with traceback_kept(whose):
        returned = forward(*inputs, **named)
    require([*inputs, *named.values()][0], returned)
    return returned


def _require_attributes(name: str, encoder: nn.Module, *attributes: str) -> None:
    if missing := [attribute for attribute in attributes if not hasattr(encoder, attribute)]:
        raise ConfigError(
            f"the {type(encoder).__name__} of the encoder {name} has no {' and no '.join(missing)}; expected the "
            f"attributes {', '.join(attributes)}: pass them to super().__init__"
        )
    for attribute in attributes:
        value = getattr(encoder, attribute)
        numbers = value if attribute == "grid" else (value,)
        expected = "a tuple of two whole numbers" if attribute == "grid" else "a whole number"
        pair = attribute != "grid" or (isinstance(value, tuple) and len(value) == 2)
        if not pair or any(type(number) is not int or number < 1 for number in numbers):
            raise ConfigError(
                f"the {type(encoder).__name__} of the encoder {name} has {attribute} {value!r}; expected {expected} of "
                "at least 1: correct what it passes to super().__init__"
            )


def _require_tokens(name: str, encoder: VideoEncoder, frames: Tensor, tokens: object) -> None:
    of_patches = (len(frames), encoder.steps, prod(encoder.grid))
    expected = {"cls": (len(frames), encoder.width), "patches": (*of_patches, encoder.width), "saliency": of_patches}
    if encoder.coarse is not None:
        of_coarse = (len(frames), encoder.steps, encoder.coarse)
        expected |= {"coarse": (*of_coarse, encoder.coarse_width or encoder.width), "coarse_saliency": of_coarse}
    found = tokens.tensors() if isinstance(tokens, PatchTokens) else None
    _require(f"the encoder {name} returns", tokens, found, "PatchTokens", expected, frames)


def _require_states(name: str, encoder: TextEncoder, ids: Tensor, states: object) -> None:
    found = {"states": states} if isinstance(states, Tensor) else None
    of_text = f"the text half of the encoder {name} returns"
    _require(of_text, states, found, "a tensor", {"states": (*ids.shape, encoder.width)}, ids)


def _require(
    who: str, returned: object, found: Mapping[str, object] | None, kind: str, expected: Shapes, given: Tensor
) -> None:
    """Refuse `returned` unless its tensors, `found`, have the expected shapes; None means it is of the wrong kind."""
    if found is None:
        wrong, what = list(expected), f"an object of type {type(returned).__name__}"
    else:
        wrong = [key for key in {**expected, **found} if not _fits(found.get(key), expected.get(key), given)]
        what = ", ".join(f"{key} {_described(found.get(key))}" for key in wrong)
    if wrong:
        shapes = ", ".join(f"{key} {expected.get(key, '(none)')}" for key in wrong)
        raise ConfigError(
            f"{who} {what}; expected {kind} with {shapes}, of a floating-point type on {given.device}, for input "
            f"{tuple(given.shape)}: correct its forward, or the attributes that promise these shapes"
        )


def _fits(tensor: object, shape: tuple[int, ...] | None, given: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tuple(tensor.shape) == shape
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.device == given.device
    )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f", {value.layout},"
        return f"{tuple(value.shape)} of {value.dtype}{layout} on {value.device}"
    return "(none)" if value is None else f"of type {type(value).__name__}"
