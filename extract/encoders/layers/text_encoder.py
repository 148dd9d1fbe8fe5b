"""The interface of every text network: token ids in, states out.

Shape legend: B texts, L tokens, D channels, P width of the joint space.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# From texts to input ids [B, L] and attention mask [B, L] bool.
Tokenizer = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class TextEncoder(nn.Module):
    """A frozen text network down to `depth`.

    Attributes:
        width: Channels of a state, D.
        depth: Number of layers that run.
    """

    def __init__(self, model: nn.Module, width: int, depth: int, projection: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.projection = projection
        self.width = width
        self.depth = depth
        self.eval().requires_grad_(False)

    @property
    def words(self) -> int | None:
        """Number of different tokens that the network has a vector for; None if it does not say."""
        # A network of another package need not be a model of transformers, nor have a `model` at all.
        vectors_of = getattr(getattr(self, "model", None), "get_input_embeddings", None)
        return getattr(vectors_of(), "num_embeddings", None) if vectors_of else None

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts.

        Args:
            input_ids: [B, L] long.
            attention_mask: [B, L], nonzero on tokens.

        Returns:
            [B, L, D], states after layer `depth`.
        """
        return self.model(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state

    @torch.inference_mode()
    def project(self, first: Tensor) -> Tensor:
        """[B, D] states of the first token at the last layer, to the joint space [B, P].

        Raises:
            ValueError: The encoder stops before the last layer.
        """
        if self.projection is None:
            raise ValueError(f"project has no meaning at depth {self.depth}; load the text encoder with its full depth")
        return self.projection(first)
