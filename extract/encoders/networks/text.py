"""Text halves of the published networks, run by transformers with the checkpoint's own weights, and their tokenizers.

Shape legend: B texts, L tokens, D channels, P width of the joint space.
"""

import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
)

from egopatch.configs.schema import ConfigError
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.checkpoints.package import text_folder
from egopatch.extract.encoders.layers.spacetime import HEAD_WIDTH
from egopatch.extract.encoders.layers.video_encoder import check_depth
from egopatch.extract.encoders.networks import egovlp, egovlpv2

Tokenizer = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class TextEncoder(nn.Module):
    """A frozen text network down to `depth`.

    Attributes:
        width: D. depth: layers run.
    """

    def __init__(self, model: nn.Module, width: int, depth: int, projection: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.projection = projection
        self.width = width
        self.depth = depth
        self.eval().requires_grad_(False)

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
            ValueError: the encoder stops before the last layer.
        """
        if self.projection is None:
            raise ValueError(f"project has no meaning at depth {self.depth}; load the text encoder with its full depth")
        return self.projection(first)


def build_roberta(checkpoint: Checkpoint, depth: int) -> TextEncoder:
    """EgoVLPv2's and MFAS's text network, without video: layers 0 to depth - 1.

    Raises:
        CheckpointError: another network's checkpoint, a tensor missing or re-shaped, or no such depth.
    """
    checkpoint.require("egovlpv2", "mfas")
    layers = egovlpv2.text_layers(checkpoint)
    check_depth(depth, layers, "the number of its text layers", checkpoint)
    vocabulary, width = checkpoint.shape("text_model.embeddings.word_embeddings.weight")
    positions = checkpoint.shape("text_model.embeddings.position_embeddings.weight")[0]
    config = RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        intermediate_size=checkpoint.shape("text_model.encoder.layer.0.intermediate.dense.weight")[0],
        max_position_embeddings=positions,
        type_vocab_size=checkpoint.shape("text_model.embeddings.token_type_embeddings.weight")[0],
        layer_norm_eps=1e-5,
    )
    with torch.device("meta"):
        model = RobertaModel(config, add_pooling_layer=False)
        projection = egovlpv2.projection_layers(checkpoint, "txt_proj") if depth == layers else None
    checkpoint.fill(model, "text_model.")
    # Buffers that are in no checkpoint.
    model.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros(1, positions, dtype=torch.long), persistent=False)
    if projection is not None:
        checkpoint.fill(projection, "txt_proj.")
    return TextEncoder(model, width, depth, projection)


def build_distilbert(checkpoint: Checkpoint, depth: int) -> TextEncoder:
    """EgoVLP's text network: layers 0 to depth - 1.

    Raises:
        CheckpointError: another network's checkpoint, a tensor missing or re-shaped, or no such depth.
    """
    checkpoint.require("egovlp")
    layers = egovlp.text_layers(checkpoint)
    check_depth(depth, layers, "the number of its text layers (text.depth)", checkpoint)
    vocabulary, width = checkpoint.shape("text_model.embeddings.word_embeddings.weight")
    positions = checkpoint.shape("text_model.embeddings.position_embeddings.weight")[0]
    config = DistilBertConfig(
        vocab_size=vocabulary,
        dim=width,
        n_layers=depth,
        n_heads=max(1, width // HEAD_WIDTH),
        hidden_dim=checkpoint.shape("text_model.transformer.layer.0.ffn.lin1.weight")[0],
        max_position_embeddings=positions,
    )
    with torch.device("meta"):
        model = DistilBertModel(config)
        joint = checkpoint.shape("txt_proj.1.weight")[0] if depth == layers else 0
        projection = nn.Sequential(nn.ReLU(), nn.Linear(width, joint)) if depth == layers else None
    checkpoint.fill(model, "text_model.")
    model.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    if projection is not None:
        checkpoint.fill(projection, "txt_proj.")
    return TextEncoder(model, width, depth, projection)


def build_bert(checkpoint: Checkpoint, depth: int) -> TextEncoder:
    """A BERT network as transformers writes it: layers 0 to depth - 1.

    Args:
        checkpoint: `model.safetensors` of a folder that has its `config.json` beside it.
        depth: layers to run.

    Raises:
        CheckpointError: another network's checkpoint, a config that is no BERT's, a tensor missing or re-shaped, or no
            such depth.
    """
    checkpoint.require("bert")
    beside = checkpoint.path.with_name("config.json")
    try:
        config = BertConfig.from_dict({**json.loads(beside.read_text()), "num_hidden_layers": depth})
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{beside}: not the config of a BERT network ({' '.join(str(error).split())})") from error
    layers = checkpoint.count(r"encoder\.layer\.(\d+)\.")
    check_depth(depth, layers, "the number of its text layers (text.depth)", checkpoint)
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    checkpoint.fill(model)
    # Buffers that are in no checkpoint.
    positions = config.max_position_embeddings
    model.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros(1, positions, dtype=torch.long), persistent=False)
    return TextEncoder(model, config.hidden_size, depth, None)


def load_tokenizer(model: str, max_length: int = 30) -> Tokenizer:
    """The tokenizer of a text network.

    Args:
        model: a local folder, a name on the hub, or the name of a package (see `extract.encoders.checkpoints.package`).
        max_length: L; questions are padded or cut to it.

    Returns:
        A function from texts to input ids [B, L] and attention mask [B, L] (bool); it lower-cases, as published.

    Raises:
        ConfigError: no tokenizer is there; the message names `text.model`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(text_folder(model))
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"text.model is {model!r}; expected a folder with a tokenizer or a name on the hub ({reason})"
        ) from error

    def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(
            [text.lower() for text in texts],
            padding="max_length",
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"].bool()

    return tokenize
