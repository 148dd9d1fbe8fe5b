"""Baselines that read no video: they measure what the answer statistics and the question alone reveal."""

import torch
from torch import Tensor, nn

from egopatch.configs.schema import HeadConfig
from egopatch.train.data.batch import Batch
from egopatch.train.data.question_table import FORMS, QuestionTable
from egopatch.train.heads.common.question import Classifier, QuestionReader, Sizes


class Majority(nn.Module):
    """The most frequent training answer of the question's form, open or binary, or the most frequent index of the right
    option. It has no trainable parameters.
    """

    counts: Tensor

    def __init__(self, answers: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(len(FORMS), answers))

    @torch.no_grad()
    def count(self, table: QuestionTable) -> None:
        """Count the answers of the training questions; a form without questions uses the counts over both forms."""
        pairs = table.form * self.counts.shape[1] + table.answer
        counts = torch.bincount(pairs, minlength=self.counts.numel()).view(self.counts.shape).float()
        empty = counts.sum(1, keepdim=True) == 0
        self.counts.copy_(torch.where(empty, counts.sum(0, keepdim=True), counts))

    def forward(self, batch: Batch) -> Tensor:
        """Counts [B, A] as logits; the first of equally frequent answers wins."""
        counts = self.counts[batch.forms]
        return counts if batch.options is None else counts.masked_fill(batch.options.lengths < 0, -1)


class QuestionOnly(nn.Module):
    """Predicts the answer from the question text alone: the strongest baseline without video."""

    def __init__(self, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        self.read = QuestionReader(sizes.text_width, config.width, config.heads, config.dropout)
        self.classify = Classifier(config.width, config.width, sizes.answers, config.dropout)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        return self.classify(self.read(batch.states, batch.mask)[batch.text_index])
