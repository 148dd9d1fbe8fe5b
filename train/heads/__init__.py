"""The systems of the table. `build_head` makes one to train; `load_head` loads a published one's upper half."""

from typing import Literal

from torch import Tensor, nn

from configs.schema import Config, ConfigError
from extract.encoders import Checkpoint, open_checkpoint
from features import PatchTokens
from train.batches import Batch
from train.heads.blind import Majority, QuestionOnly
from train.heads.fused import load_head
from train.heads.pooled import Pooled
from train.heads.psa import PSA
from train.heads.question import Sizes

__all__ = ["BLIND", "PSA", "Majority", "Pooled", "QuestionOnly", "Sizes", "build_head", "load_head"]

# Systems that read no video.
BLIND = ("majority", "question-only")
TRAINABLE = (*BLIND, "pooled", "egovlp", "egovlpv2", "psa")


class Fused(nn.Module):
    """A published network's upper half, fine-tuned on cached tokens: every question fuses with its own clip."""

    def __init__(self, arch: Literal["egovlpv2"], checkpoint: Checkpoint, answers: int) -> None:
        super().__init__()
        self.network = load_head(arch, checkpoint, answers=answers)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        assert batch.tokens is not None
        tokens = {name: tensor.float() for name, tensor in batch.tokens.tensors().items()}
        states, mask = batch.states.float()[batch.text_index], batch.mask[batch.text_index]
        return self.network(PatchTokens(**tokens), states, mask, batch.clip_index)


def build_head(config: Config, sizes: Sizes) -> nn.Module:
    """The untrained head that `head.name` asks for; `egovlpv2` and `mfas` start from `encoder.checkpoint`.

    Raises:
        ValueError: the checkpoint of a fused head is missing or another network's.
    """
    head = config.head
    if head.name == "majority":
        return Majority(sizes.answers)
    if head.name == "question-only":
        return QuestionOnly(head, sizes)
    if head.name in ("pooled", "egovlp"):  # one head; the second names the published system
        return Pooled(head, sizes)
    if head.name == "psa":
        return PSA(head, sizes)
    if head.name == "egovlpv2":
        return Fused(head.name, open_checkpoint(head.name, config.encoder.checkpoint), sizes.answers)
    raise ConfigError(
        f"head.name is {head.name!r}, which cannot be trained yet; expected one of {', '.join(TRAINABLE)}"
    )
