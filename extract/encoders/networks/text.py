"""Text networks, run by transformers with the checkpoint's own weights, and their tokenizers.

Shape legend: B texts, L tokens.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from egopatch.configs.schema import ConfigError
from egopatch.extract.encoders.checkpoints.checkpoint import Checkpoint, CheckpointError
from egopatch.extract.encoders.checkpoints.package import text_folder
from egopatch.extract.encoders.layers.projection import TEXT_LAYERS, projection_layers, text_layers
from egopatch.extract.encoders.layers.spacetime import HEAD_WIDTH
from egopatch.extract.encoders.layers.text_encoder import TextEncoder, Tokenizer
from egopatch.extract.encoders.layers.video_encoder import check_depth
from egopatch.features.io.lfs import pointer_fault

# transformers takes seconds to import, and its models 160 MB: each function imports what it needs, which the video half
# does not.
if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase, RobertaModel

_TOKENIZER_FILES = (".json", ".txt", ".model")  # weights, which may lie beside them, are not always needed


def build_roberta(checkpoint: Checkpoint, depth: int) -> TextEncoder:
    """EgoVLPv2's and MFAS's text network, without video: layers 0 to depth - 1.

    Raises:
        CheckpointError: Another network's checkpoint; a missing or misshapen tensor; or a depth that is out of range.
    """
    from transformers import RobertaConfig, RobertaModel

    checkpoint.require("egovlpv2", "mfas")
    layers = _layers_for(depth, checkpoint)
    vocabulary, width = checkpoint.shape("text_model.embeddings.word_embeddings.weight", 2)
    positions = checkpoint.shape("text_model.embeddings.position_embeddings.weight", 2)[0]
    config = RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        intermediate_size=checkpoint.shape("text_model.encoder.layer.0.intermediate.dense.weight", 2)[0],
        max_position_embeddings=positions,
        type_vocab_size=checkpoint.shape("text_model.embeddings.token_type_embeddings.weight", 2)[0],
        layer_norm_eps=1e-5,
    )
    with torch.device("meta"):
        model = RobertaModel(config, add_pooling_layer=False)
        projection = projection_layers(checkpoint, "txt_proj") if depth == layers else None
    checkpoint.fill(model, "text_model.")
    _fill_buffers(model, positions)
    if projection is not None:
        checkpoint.fill(projection, "txt_proj.")
    return TextEncoder(model, width, depth, projection)


def build_distilbert(checkpoint: Checkpoint, depth: int) -> TextEncoder:
    """EgoVLP's text network: layers 0 to depth - 1.

    Raises:
        CheckpointError: Another network's checkpoint; a missing or misshapen tensor; or a depth that is out of range.
    """
    from transformers import DistilBertConfig, DistilBertModel

    checkpoint.require("egovlp")
    layers = _layers_for(depth, checkpoint)
    vocabulary, width = checkpoint.shape("text_model.embeddings.word_embeddings.weight", 2)
    positions = checkpoint.shape("text_model.embeddings.position_embeddings.weight", 2)[0]
    config = DistilBertConfig(
        vocab_size=vocabulary,
        dim=width,
        n_layers=depth,
        n_heads=max(1, width // HEAD_WIDTH),
        hidden_dim=checkpoint.shape("text_model.transformer.layer.0.ffn.lin1.weight", 2)[0],
        max_position_embeddings=positions,
    )
    with torch.device("meta"):
        model = DistilBertModel(config)
        projection = None
        if depth == layers:
            projection = nn.Sequential(nn.ReLU(), nn.Linear(width, checkpoint.shape("txt_proj.1.weight", 2)[0]))
    checkpoint.fill(model, "text_model.")
    model.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    if projection is not None:
        checkpoint.fill(projection, "txt_proj.")
    return TextEncoder(model, width, depth, projection)


def build_bert(checkpoint: Checkpoint, depth: int) -> TextEncoder:
    """A BERT network as transformers writes it: layers 0 to depth - 1.

    Args:
        checkpoint: `model.safetensors` in a folder with the network's `config.json`.
        depth: Number of layers to run.

    Raises:
        CheckpointError: Another network's checkpoint or config; a missing or misshapen tensor; or a depth that is out
            of range.
    """
    from transformers import BertConfig, BertModel

    checkpoint.require("bert")
    beside = checkpoint.path.with_name("config.json")
    try:
        config = BertConfig.from_dict({**json.loads(beside.read_text()), "num_hidden_layers": depth})
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{beside}: not the config of a BERT network ({' '.join(str(error).split())})") from error
    _layers_for(depth, checkpoint)
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    checkpoint.fill(model)
    _fill_buffers(model, config.max_position_embeddings)
    return TextEncoder(model, config.hidden_size, depth, None)


def _fill_buffers(model: "RobertaModel | BertModel", positions: int) -> None:
    """Fill the buffers that checkpoints leave out."""
    model.embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    model.embeddings.register_buffer("token_type_ids", torch.zeros(1, positions, dtype=torch.long), persistent=False)


def _layers_for(depth: int, checkpoint: Checkpoint) -> int:
    """Number of text layers in the checkpoint, of which the first `depth` will run.

    Raises:
        CheckpointError: The checkpoint has fewer than `depth` text layers, or none.
    """
    layers = text_layers(checkpoint)
    if not layers:
        root = TEXT_LAYERS[checkpoint.network or ""]
        raise CheckpointError(f"{checkpoint.path}: has no text layers; expected tensors under {root}")
    check_depth(depth, layers, "the number of its text layers (text.depth)", checkpoint)
    return layers


def _pretrained_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    import tokenizers
    import transformers

    from egopatch.extract.encoders.networks.hub import parse_hub_model, why_unreachable

    folder = text_folder(model)
    expected = "expected a folder with a tokenizer or a name on the hub"
    local = Path(folder).is_dir()
    named = None if local else parse_hub_model(model)
    if not local and named is None:
        raise ConfigError(f"text.model is {model!r}, which does not exist; {expected}")
    if local:
        _refuse_pointers(model, Path(folder))
    name, revision = (folder, "main") if named is None else (named.name, named.revision or "main")
    offline = None
    try:
        with suppress(OSError):  # the hub's cache first, without asking the hub
            return transformers.AutoTokenizer.from_pretrained(name, revision=revision, local_files_only=True)
        offline = None if local else why_unreachable()
        return transformers.AutoTokenizer.from_pretrained(
            name, revision=revision, local_files_only=local or offline is not None
        )
    except Exception as error:  # the Rust tokenizers raise nothing more special
        if offline:
            raise ConfigError(
                f"text.model is {model!r}, which is neither a folder here nor in the hub's cache, and {offline}; copy "
                "the tokenizer here and set text.model to its folder (`egopatch extract data` fetches published ones)"
            ) from error
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        if local:
            raise ConfigError(
                f"text.model is {model!r}, whose tokenizer cannot be read ({reason}); its files are damaged, "
                f"incomplete, or too new for transformers {transformers.__version__} and tokenizers "
                f"{tokenizers.__version__}: copy them again, or upgrade both packages"
            ) from error
        raise ConfigError(f"text.model is {model!r}; {expected} ({reason})") from error


def _refuse_pointers(model: str, folder: Path) -> None:
    """Refuse a tokenizer with a pointer of Git LFS in place of a file; as `vocab.txt`, it would be a vocabulary."""
    with suppress(OSError):  # of which the attempt to load the tokenizer tells more
        for file in sorted(folder.iterdir()):
            if file.suffix in _TOKENIZER_FILES and file.is_file() and (fault := pointer_fault(file)):
                raise ConfigError(f"text.model is {model!r}, whose {file.name} {fault}")


def load_tokenizer(model: str, max_length: int = 30) -> Tokenizer:
    """The tokenizer of a text network.

    Args:
        model: A local folder, a name on the hub, or the name of a package (see `extract.encoders.checkpoints.package`).
        max_length: L, the length that texts are padded or cut to.

    Returns:
        A function from texts to input ids [B, L] and attention mask [B, L] (bool). It lower-cases, as published.

    Raises:
        ConfigError: `text.model` names no tokenizer, one that this version of transformers cannot read, one that cannot
            encode a question, or one on the hub, and the hub cannot be reached.
    """
    tokenizer = _pretrained_tokenizer(model)

    def tokenize(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(
            [text.lower() for text in texts],
            padding="max_length",
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        return batch["input_ids"], batch["attention_mask"].bool()

    try:
        tokenize(["what is held?"])
    except Exception as error:  # as in `_pretrained_tokenizer`
        reason = " ".join(str(error).partition(". ")[0].split()) or type(error).__name__
        raise ConfigError(
            f"text.model is {model!r}, whose tokenizer cannot encode a question ({reason}); correct its files, such as "
            "pad_token in tokenizer_config.json, or name another text model"
        ) from error
    return tokenize
