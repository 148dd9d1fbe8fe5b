"""Tiny networks with random weights in the published file format, so that every command runs without a download.

The weights are a function of each tensor's name and the seed. They are untrained: a random projection keeps different
inputs apart, which is enough to try the whole pipeline.
"""

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from egopatch.extract.encoders.checkpoints.checkpoint import load_checkpoint
from egopatch.extract.errors import CheckpointError

Shapes = Iterator[tuple[str, tuple[int, ...]]]

CLS_TOKEN = "video_model.cls_token"
FUSION_GATE = 0.5
POSITIONS = 64
PIECES = 1000  # largest vocabulary of a tokenizer


@dataclass(frozen=True)
class Standin:
    """The files that `write_standin` wrote.

    Attributes:
        checkpoint: Checkpoint in the network's published container.
        tokenizer: Folder for `load_tokenizer`.
    """

    checkpoint: Path
    tokenizer: Path


def write_standin(
    arch: str,
    path: Path | str,
    *,
    texts: Sequence[str],
    width: int = 128,
    depth: int = 4,
    fusion: int = 2,
    frames: int = 4,
    size: int = 112,
    patch: int = 16,
    joint: int = 64,
    answers: int | None = None,
    seed: int = 0,
    tokenizer: Path | str | None = None,
) -> Standin:
    """Write a tiny random-weight checkpoint and a tokenizer trained on `texts`; the same arguments give equal files.

    Args:
        arch: egovlp or egovlpv2; decides tensor names, container and kind of tokenizer.
        path: Checkpoint file to write; missing parent folders are created.
        texts: Training texts of the tokenizer, which encodes any other text too.
        width: Channels of a token, a multiple of 64.
        depth: Number of blocks of the video network and of layers of the text network.
        fusion: First fused block (EgoVLPv2).
        frames: Number of temporal positions.
        size: Side of the input in pixels.
        patch: Side of a patch in pixels.
        joint: Width of the joint video-text space.
        answers: Number of classes, as in fine-tuned checkpoints; None writes no classifier, as in pretraining.
        seed: Seed of the weights.
        tokenizer: Folder for the tokenizer; None puts it beside the checkpoint, as `<stem>-tokenizer`.

    Raises:
        ValueError: `width` is not a multiple of 64, `size` not of `patch`, `fusion` is out of range, or `texts` is
            empty.
    """
    if arch not in ("egovlp", "egovlpv2"):
        raise ValueError(f"arch is {arch!r}; expected egovlp or egovlpv2")
    if width % 64 or width < 64:
        raise ValueError(f"width is {width}; expected a multiple of 64")
    if size % patch:
        raise ValueError(f"size is {size}; expected a multiple of patch, {patch}")
    if not 1 <= fusion <= depth:
        raise ValueError(f"fusion is {fusion}; expected 1 to depth, {depth}")
    if not texts:
        raise ValueError("texts is empty; the tokenizer needs training texts")
    path = Path(path)
    folder = Path(tokenizer) if tokenizer is not None else path.with_name(f"{path.stem}-tokenizer")
    path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = write_tokenizer(folder, texts, "roberta" if arch == "egovlpv2" else "bert")
    shapes = published_shapes(
        arch,
        width=width,
        depth=depth,
        text_layers=depth,
        fusion=fusion,
        frames=frames,
        patches=(size // patch) ** 2,
        patch=patch,
        vocabulary=vocabulary,
        positions=POSITIONS,
        joint=joint,
        answers=answers,
    )
    tensors = {f"module.{name}": random_weight(name, shape, seed) for name, shape in shapes.items()}
    torch.save({"arch": "FrozenInTime", "epoch": 0, "state_dict": tensors}, path)
    return Standin(path, folder)


def is_standin(path: Path) -> bool:
    """Whether `write_standin` wrote the file, in any sizes and with the seed 0."""
    try:
        token = load_checkpoint(path).tensors.get(CLS_TOKEN)
    except CheckpointError:
        return False
    return token is not None and torch.equal(token.float(), random_weight(CLS_TOKEN, tuple(token.shape), seed=0))


def is_standin_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer as small as those of `write_tokenizer`; published ones have far more pieces."""
    try:
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return len(vocabulary) <= PIECES


def published_shapes(
    arch: str,
    *,
    width: int,
    depth: int,
    text_layers: int,
    fusion: int,
    frames: int,
    patches: int,
    patch: int,
    vocabulary: int,
    positions: int,
    joint: int,
    answers: int | None,
) -> dict[str, tuple[int, ...]]:
    """Name (without `module.`) and shape of every tensor of a published network of these sizes.

    Args: As for `write_standin`; `positions` and `vocabulary` are the sizes of the text network's embeddings.
    """
    if arch == "egovlp":
        return dict(_video_shapes(width, depth, depth, frames, patches, patch)) | dict(
            [
                *_distilbert_shapes(width, text_layers, vocabulary, positions),
                *_linear("txt_proj.1", joint, width),
                *_linear("vid_proj.0", joint, width),
            ]
        )
    return dict(_video_shapes(width, depth, fusion, frames, patches, patch)) | dict(
        [
            *_roberta_shapes(width, text_layers, fusion, vocabulary, positions),
            *_egovlpv2_head_shapes(width, joint, vocabulary, answers),
        ]
    )


def write_tokenizer(folder: Path, texts: Sequence[str], kind: Literal["roberta", "bert"]) -> int:
    """Train a tokenizer on lower-cased `texts` and write it to `folder`; returns the size of its vocabulary.

    Args:
        folder: Folder to write, created if it is missing.
        texts: Training texts.
        kind: `roberta` is byte-pair encoding with `<s> </s>`, `bert` is word pieces with `[CLS] [SEP]`; special tokens
            have their usual ids.
    """
    # Both take seconds to import, and shapes and weights do not need them.
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names: dict[str, str]
    if kind == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), special, strict=True))
        names |= {"bos_token": "<s>", "eos_token": "</s>"}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=PIECES, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(sorted({text.lower() for text in texts}), trainer)
    else:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
        # The library's own word-piece trainer numbers its pieces differently from run to run.
        vocabulary = special + _word_pieces(texts, PIECES - len(special))
        tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
    first, last = names["cls_token"], names["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(first, special.index(first)), (last, special.index(last))],
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def _word_pieces(texts: Sequence[str], pieces: int) -> list[str]:
    """At most `pieces` word pieces: characters at the start and inside of words, then the most frequent words."""
    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower()))
    characters = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation, *"".join(words)})
    inside = [f"##{c}" for c in characters if c.isalnum()]
    frequent = sorted((w for w in words if len(w) > 1), key=lambda w: (-words[w], w))
    return [*characters, *inside, *frequent][:pieces]


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 values of the tensor called `name`: norms about 1, matrices scaled by their fan-in, embeddings 0.1."""
    if name.endswith("position_ids"):
        return torch.arange(shape[-1])[None]
    if name.endswith(("alpha_i2t", "alpha_t2i")):
        return torch.full(shape, FUSION_GATE)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))
    lower = name.lower()
    if "norm" in lower and name.endswith("weight"):
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.02 * noise
    if len(shape) >= 2 and ("embed" not in lower or "patch_embed" in lower):
        return noise / noise[0].numel() ** 0.5
    return 0.1 * noise


def _linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _video_shapes(width: int, depth: int, fusion: int, frames: int, patches: int, patch: int) -> Shapes:
    root = "video_model"
    yield f"{root}.cls_token", (1, 1, width)
    yield f"{root}.pos_embed", (1, 1 + patches, width)
    yield f"{root}.temporal_embed", (1, frames, width)
    yield f"{root}.patch_embed.proj.weight", (width, 3, patch, patch)
    yield f"{root}.patch_embed.proj.bias", (width,)
    for i in range(depth):
        block = f"{root}.blocks.{i}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", width)
        for attention in ("attn", "timeattn"):
            yield from _linear(f"{block}.{attention}.qkv", 3 * width, width)
            yield from _linear(f"{block}.{attention}.proj", width, width)
        if i >= fusion:
            yield f"{block}.attn.alpha_i2t", (1,)
            yield from _linear(f"{block}.attn.qkv_text_i2t", 2 * width, width)
            yield from _linear(f"{block}.attn.qkv_i2t", width, width)
            yield from _linear(f"{block}.attn.proj_i2t", width, width)
            yield from _norm(f"{block}.attn.norm_i2t_i", width)
        yield from _linear(f"{block}.mlp.fc1", 4 * width, width)
        yield from _linear(f"{block}.mlp.fc2", width, 4 * width)
    yield from _norm(f"{root}.norm", width)


def _roberta_shapes(width: int, layers: int, fusion: int, vocabulary: int, positions: int) -> Shapes:
    root = "text_model"
    yield f"{root}.embeddings.position_ids", (1, positions)
    yield f"{root}.embeddings.word_embeddings.weight", (vocabulary, width)
    yield f"{root}.embeddings.position_embeddings.weight", (positions, width)
    yield f"{root}.embeddings.token_type_embeddings.weight", (1, width)
    yield from _norm(f"{root}.embeddings.LayerNorm", width)
    for i in range(layers):
        layer = f"{root}.encoder.layer.{i}"
        for attention in ("attention", *(("crossattention_t2i",) if i >= fusion else ())):
            for part in ("query", "key", "value"):
                yield from _linear(f"{layer}.{attention}.self.{part}", width, width)
            yield from _linear(f"{layer}.{attention}.output.dense", width, width)
        if i >= fusion:
            yield f"{layer}.alpha_t2i", (1,)
        yield from _norm(f"{layer}.attention.output.LayerNorm", width)
        yield from _linear(f"{layer}.intermediate.dense", 4 * width, width)
        yield from _linear(f"{layer}.output.dense", width, 4 * width)
        yield from _norm(f"{layer}.output.LayerNorm", width)


def _egovlpv2_head_shapes(width: int, joint: int, vocabulary: int, answers: int | None) -> Shapes:
    yield "cls_token", (1, 1, width)
    yield from _norm("norm", width)
    for side in ("txt_proj", "vid_proj"):
        yield from _linear(f"{side}.0", joint, width, bias=False)
        yield from _linear(f"{side}.2", joint, joint)
        yield from _linear(f"{side}.4", joint, joint)
    for modality in ("text", "video"):
        yield from _linear(f"cross_modal_{modality}_transform", width, width)
        yield from _linear(f"cross_modal_{modality}_pooler.dense", width, width)
    yield "mlm_score.bias", (vocabulary,)
    yield from _linear("mlm_score.transform.dense", width, width)
    yield from _norm("mlm_score.transform.LayerNorm", width)
    yield "mlm_score.decoder.weight", (vocabulary, width)
    yield from _linear("itm_score.fc", 2, 2 * width)
    if answers is not None:
        yield from _linear("projector_1", answers, width)
        yield from _linear("projector_2", answers, answers)


def _distilbert_shapes(width: int, layers: int, vocabulary: int, positions: int) -> Shapes:
    root = "text_model"
    yield f"{root}.embeddings.word_embeddings.weight", (vocabulary, width)
    yield f"{root}.embeddings.position_embeddings.weight", (positions, width)
    yield from _norm(f"{root}.embeddings.LayerNorm", width)
    for i in range(layers):
        layer = f"{root}.transformer.layer.{i}"
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            yield from _linear(f"{layer}.attention.{part}", width, width)
        yield from _norm(f"{layer}.sa_layer_norm", width)
        yield from _linear(f"{layer}.ffn.lin1", 4 * width, width)
        yield from _linear(f"{layer}.ffn.lin2", width, 4 * width)
        yield from _norm(f"{layer}.output_layer_norm", width)
