"""The mean colour of each 16x16 patch, scaled by the checkpoint."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from egopatch.extract.encoders import (
    Checkpoint,
    Network,
    VideoEncoder,
    VideoOptions,
    build_sentence_text,
    sentence_text_weights,
)
from egopatch.extract.video.transforms import Transform
from egopatch.features import PatchTokens


class Colours(VideoEncoder):
    def __init__(self, scale: Tensor, frames: int, size: int) -> None:
        super().__init__(grid=(size // 16, size // 16), width=3, depth=1, num_frames=frames, size=size)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> PatchTokens:
        self.check(frames)
        means = F.avg_pool2d(frames.flatten(0, 1), 16).flatten(2).transpose(1, 2).unflatten(0, frames.shape[:2])
        return PatchTokens(means.mean((1, 2)), means * self.scale, means.norm(dim=-1))


def build_video(checkpoint: Checkpoint, options: VideoOptions) -> Colours:
    return Colours(checkpoint.tensors["scale"], options.num_frames, options.size or 64)


WHOLE = Transform("whole", None, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
NETWORK = Network("colours", build_video, build_sentence_text, WHOLE, text_weights=sentence_text_weights)
