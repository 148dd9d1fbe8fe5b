"""The systems of the table. `build_head` makes one to train; `load_head` loads a published one's upper half."""

from torch import Tensor, nn

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.encoders import open_checkpoint
from egopatch.features import PatchTokens
from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.blind import Majority, QuestionOnly
from egopatch.train.heads.common.noise import Dropout
from egopatch.train.heads.common.pooled import Pooled
from egopatch.train.heads.common.question import Sizes
from egopatch.train.heads.fused.fused import DROPOUT, FusedHead, load_head
from egopatch.train.heads.psa.coarse import scaled
from egopatch.train.heads.psa.psa import PSA

# Systems that read no video.
BLIND = ("majority", "question-only")


class Fused(nn.Module):
    """A published network's upper half on cached tokens: every question fuses with its own clip."""

    def __init__(self, network: FusedHead) -> None:
        super().__init__()
        self.network = network
        network.dropout = Dropout(DROPOUT)  # torch's own draws from a state that a resumed run would lack

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        given = batch.tokens
        # Of the coarse tower the upper half reads the saliency alone.
        tokens = PatchTokens(given.cls, scaled(given), given.saliency, coarse_saliency=given.coarse_saliency)
        states, mask = batch.states.float()[batch.text_index], batch.mask[batch.text_index]
        return self.network(tokens, states, mask, batch.clip_index)


def build_head(config: Config, sizes: Sizes) -> nn.Module:
    """The untrained head that `head.name` asks for.

    `egovlpv2` and `mfas` start from `head.checkpoint`, or from `encoder.checkpoint` where that is null.

    Raises:
        ConfigError: the store cannot feed the head, or a `head.checkpoint` for a head that starts from none.
        CheckpointError: the checkpoint of a fused head is missing or another network's.
    """
    head = config.head
    if head.name in ("egovlpv2", "mfas"):
        return _build_fused(config, sizes)
    if head.checkpoint is not None:
        raise ConfigError(
            f"head.checkpoint is {head.checkpoint}, but a {head.name} head starts from none; expected null, or "
            "head.name egovlpv2 or mfas"
        )
    if head.name == "majority":
        return Majority(sizes.answers)
    if head.name == "question-only":
        return QuestionOnly(head, sizes)
    if head.name in ("pooled", "egovlp"):  # one head; the second names the published system
        return Pooled(head, sizes)
    return PSA(head, sizes)


def _build_fused(config: Config, sizes: Sizes) -> Fused:
    name = config.head.name
    assert name in ("egovlpv2", "mfas")
    if sizes.patches < sizes.grid[0] * sizes.grid[1]:
        raise ConfigError(
            f"head.name is {name}, which reads whole frames, but the store holds {sizes.patches} of "
            f"{sizes.grid[0] * sizes.grid[1]} patches of each; expected the store that it was derived from"
        )
    if name == "mfas" and config.encoder.arch != "mfas":
        raise ConfigError(
            f"head.name is mfas but encoder.arch is {config.encoder.arch}, which has no coarse tower; expected mfas"
        )
    checkpoint = open_checkpoint(name, config.head.checkpoint or config.encoder.checkpoint)
    return Fused(load_head(name, checkpoint, sizes.answers, config.encoder.variant))
