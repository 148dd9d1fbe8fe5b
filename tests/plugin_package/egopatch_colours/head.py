"""The mean patch, gated by the question's first state; dropout is torch's own."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from egopatch.features import PatchTokens
from egopatch.train.data.batch import Batch
from egopatch.train.heads import Head, Sizes


@dataclass(frozen=True)
class Options:
    hidden: int = 16
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"hidden is {self.hidden}; expected at least 1")


class Gated(nn.Module):
    mean: Tensor

    def __init__(self, options: Options, sizes: Sizes) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(sizes.width))
        self.gate = nn.Linear(sizes.text_width, options.hidden)
        self.see = nn.Linear(sizes.width, options.hidden)
        self.drop = nn.Dropout(options.dropout)
        self.answer_of = nn.Linear(options.hidden, sizes.answers)

    def measure(self, tokens: PatchTokens) -> None:
        self.mean.copy_(tokens.patches.float().mean((0, 1, 2)))

    def forward(self, batch: Batch) -> Tensor:
        video = self.see(batch.tokens.patches.float().mean((1, 2)) - self.mean)[batch.clip_index]
        gate = self.gate(batch.states[:, 0].float())[batch.text_index].sigmoid()
        return self.answer_of(self.drop(video.relu() * gate))


HEAD = Head("gated", Gated, Options)
