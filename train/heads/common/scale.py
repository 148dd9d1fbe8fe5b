"""Patches of a quantised store in their original scale."""

from torch import Tensor

from egopatch.features import PatchTokens


def scaled_patches(tokens: PatchTokens) -> Tensor:
    """The patches [C, T, n, D] in float32, multiplied by their scale if the store quantises them."""
    return scaled(tokens.patches, tokens.scale)


def scaled(patches: Tensor, scale: Tensor | None) -> Tensor:
    """`patches` [C, T, n, D] in float32, multiplied by `scale` [C, T, n] if there is one."""
    return patches.float() if scale is None else patches.float() * scale[..., None]
