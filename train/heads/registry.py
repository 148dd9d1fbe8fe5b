"""Builds the head that a config names."""

from torch import nn

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.encoders import open_checkpoint
from egopatch.train.heads.common.blind import Majority, QuestionOnly
from egopatch.train.heads.common.pooled import Pooled
from egopatch.train.heads.common.question import Sizes
from egopatch.train.heads.fused.fused import FusedSystem, load_head
from egopatch.train.heads.psa.psa import PSA


def build_head(config: Config, sizes: Sizes) -> nn.Module:
    """The untrained head named `head.name`.

    `egovlpv2` and `mfas` start from `head.checkpoint`, or from `encoder.checkpoint` if that is null.

    Raises:
        ConfigError: The store does not fit the head, or `head.checkpoint` is set for a head without one.
        CheckpointError: The checkpoint of a fused head is missing or another network's.
    """
    head = config.head
    if head.name in ("egovlpv2", "mfas"):
        return _build_fused(config, sizes)
    if head.checkpoint is not None:
        raise ConfigError(
            f"head.checkpoint is {head.checkpoint}, but a {head.name} head has no checkpoint; set it to null, or "
            "head.name to egovlpv2 or mfas"
        )
    if head.name == "majority":
        return Majority(sizes.answers)
    if head.name == "question-only":
        return QuestionOnly(head, sizes)
    if head.name in ("pooled", "egovlp"):  # one head; the second name is that of the published system
        return Pooled(head, sizes)
    return PSA(head, sizes)


def _build_fused(config: Config, sizes: Sizes) -> FusedSystem:
    name = config.head.name
    assert name in ("egovlpv2", "mfas")
    if sizes.patches < sizes.grid[0] * sizes.grid[1]:
        raise ConfigError(
            f"head.name is {name}, which reads whole frames, but the store has {sizes.patches} of "
            f"{sizes.grid[0] * sizes.grid[1]} patches a frame; use the store that it was derived from"
        )
    if name == "mfas" and config.encoder.arch != "mfas":
        raise ConfigError(
            f"head.name is mfas but encoder.arch is {config.encoder.arch}, which has no coarse tower; "
            "set encoder.arch to mfas"
        )
    checkpoint = open_checkpoint(name, config.head.checkpoint or config.encoder.checkpoint)
    return FusedSystem(load_head(name, checkpoint, sizes.answers, config.encoder.variant))
