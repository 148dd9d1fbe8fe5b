"""Multiple choice: makes any head score the options of its questions.

Shape legend: B questions, K options of a question at most, V unique options, W hidden width.
"""

import math

import torch
from torch import Tensor, nn

from egopatch.configs.schema import HeadConfig
from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.question import QuestionReader, Sizes

# Logit of an option that a question does not have.
ABSENT = -1e4


class Choice(nn.Module):
    """Scores each question's options: options are read like questions, and compared with the head's output.

    The head gives W numbers for each question in place of a logit for each answer. The score of an option is their
    scaled product with the option's own W numbers, plus a number that depends on the option alone. So a head reads
    question and video once, however many options there are.

    Args:
        head: Head that was built for W answers.
    """

    def __init__(self, head: nn.Module, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        self.head = head
        # Without dropout: its noise is drawn for the questions' texts.
        self.read = QuestionReader(sizes.text_width, config.width, config.heads, dropout=0.0)
        self.embed = nn.Linear(config.width, config.width)
        self.prior = nn.Linear(config.width, 1, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, K]."""
        return self.choose(self.head(batch), batch)

    def choose(self, sought: Tensor, batch: Batch) -> Tensor:
        """Logits [B, K] from the head's output `sought` [B, W]."""
        assert batch.options is not None
        options = self.read(batch.options.states, batch.options.mask)
        index = batch.options.index.clamp_min(0)
        keys, prior = self.embed(options)[index], self.prior(options)[:, 0][index]
        scores = torch.einsum("bw,bkw->bk", sought, keys) / math.sqrt(keys.shape[-1]) + prior
        return scores.masked_fill(batch.options.index < 0, ABSENT)


class LongestOption(nn.Module):
    """Chooses the option with the most characters, the first of those that tie. It has no trainable parameters."""

    def forward(self, batch: Batch) -> Tensor:
        """Lengths [B, K] as logits."""
        assert batch.options is not None
        return batch.options.lengths.float()


def unwrapped(head: nn.Module) -> nn.Module:
    """The head that reads question and video: the one inside a `Choice`, else `head` itself."""
    return head.head if isinstance(head, Choice) else head
