"""The published EgoVLP baseline: one pooled vector for the video, one for the question, an MLP on both.

Shape legend: C clips, B questions, T frames, N patches a frame, D channels, W hidden width.
"""

import torch
from torch import Tensor, nn

from egopatch.configs.schema import HeadConfig
from egopatch.features import PatchTokens
from egopatch.train.data.batch import Batch
from egopatch.train.heads.common.noise import Dropout
from egopatch.train.heads.common.question import Classifier, QuestionReader, Sizes, Whitening
from egopatch.train.heads.common.scale import scaled_patches

SHRINKAGE = 0.1


class Pooled(nn.Module):
    """Video as CLS and the mean over all patches, question as one vector from `QuestionReader`.

    Source: EgoVLP's EgoTaskQA fine-tuning concatenates its video and text embeddings before a two-layer classifier.
    """

    def __init__(self, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        self.read = QuestionReader(sizes.text_width, config.width, config.heads, config.dropout)
        self.whiten = Whitening(2 * sizes.width, SHRINKAGE)
        drop = Dropout(config.dropout, over="clips")
        self.see = nn.Sequential(nn.Linear(2 * sizes.width, config.width), nn.GELU(), drop)
        self.classify = Classifier(3 * config.width, config.width, sizes.answers, config.dropout)

    def measure(self, tokens: PatchTokens) -> None:
        """Estimate the whitening from training clips."""
        self.whiten.measure(pool(tokens))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, A]."""
        video = self.see(self.whiten(pool(batch.tokens)))[batch.clip_index]
        question = self.read(batch.states, batch.mask)[batch.text_index]
        return self.classify(torch.cat([video, question, video * question], dim=-1))


def pool(tokens: PatchTokens) -> Tensor:
    """[C, 2D]: CLS and the mean over frames and patches."""
    return torch.cat([tokens.cls.float(), scaled_patches(tokens).mean(dim=(1, 2))], dim=-1)
