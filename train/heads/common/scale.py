"""Patches of a quantised store in their original scale."""

from torch import Tensor

from egopatch.features import PatchTokens


def scaled_patches(tokens: PatchTokens) -> Tensor:
    """The patches [C, T, n, D] in float32, multiplied by their scale if the store quantises them."""
    patches = tokens.patches.float()
    return patches if tokens.scale is None else patches * tokens.scale[..., None]
