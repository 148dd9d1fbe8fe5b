"""Question texts: their frozen network, and the rows of a store's text substore that it computes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from egopatch.configs.schema import Config
from egopatch.extract.encoders import (
    Checkpoint,
    Network,
    TextEncoder,
    Tokenizer,
    find_network,
    load_text_encoder,
    load_tokenizer,
    open_checkpoint,
    open_text_checkpoint,
)
from egopatch.extract.fingerprints import text_depth, text_fingerprint
from egopatch.extract.worker.device import describe_machine, device_of
from egopatch.extract.writing.shard_writer import BackgroundShardWriter, EncodedShard
from egopatch.features import Fingerprint, ShardWork, Store, StoreSpec, create_store
from egopatch.features.common.progress import ProgressDisplay
from egopatch.features.store.text_substore import TEXT_FOLDER
from egopatch.features.values.location import parse_location
from egopatch.features.values.spec import unscaled_dtype

TEXT_BATCH = 64


@dataclass(frozen=True)
class TextNetwork:
    """The frozen text network on its device, with its checkpoint and tokenizer."""

    config: Config
    network: Network
    device: torch.device
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    encoder: TextEncoder


def load_text_network(config: Config, network: Network, device: torch.device, video: Checkpoint | None) -> TextNetwork:
    """The text network of `config.text` on `device`; where it has no file of its own, its weights come from `video`.

    Raises:
        CheckpointError, ConfigError: As for `extract_features`.
    """
    checkpoint = open_text_checkpoint(network, video, config.text.model)
    tokenizer = load_tokenizer(config.text.model, config.text.max_length)
    encoder = load_text_encoder(network, checkpoint, depth=text_depth(config)).to(device).eval()
    return TextNetwork(config, network, device, checkpoint, tokenizer, encoder)


def create_text_store(network: TextNetwork, texts: Sequence[str]) -> Store:
    """The text substore, with a row for each of `texts`."""
    config = network.config
    spec = StoreSpec.for_text(
        config.text.max_length, network.encoder.width, config.store.dtype, codec=config.store.codec
    )
    fingerprint = text_fingerprint(config, network.network, network.checkpoint.sha256)
    path = parse_location(config.store.path) / TEXT_FOLDER
    return create_store(path, spec, fingerprint, texts, format=config.store.format)


def encode_questions(config: Config, texts: Sequence[str]) -> tuple[Fingerprint, dict[str, dict[str, torch.Tensor]]]:
    """The rows that a run would store of `texts`, up to 64, and the fingerprint of the store that they belong to.

    Raises:
        CheckpointError, ConfigError: As for `extract_features`.
    """
    network = find_network(config.encoder.arch)
    video = open_checkpoint(network, config.encoder.checkpoint) if network.text_weights is None else None
    loaded = load_text_network(config, network, device_of(config.encoder.device), video)
    dtype = getattr(torch, unscaled_dtype(config.store.dtype))
    rows = _encode_text_batch(loaded.encoder, loaded.tokenizer, texts, loaded.device, dtype)
    return text_fingerprint(config, network, loaded.checkpoint.sha256), rows


def cut_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Those of `texts` that fill all tokens of `text.max_length`, so that the network does not read what follows."""
    cut: list[str] = []
    for start in range(0, len(texts), TEXT_BATCH):
        batch = texts[start : start + TEXT_BATCH]
        cut += [text for text, mask in zip(batch, tokenizer(batch)[1], strict=True) if mask.all()]
    return cut


def encode_texts(network: TextNetwork, store: Store, works: Sequence[ShardWork]) -> None:
    """Encode question texts, except those in shards that other processes hold."""
    dtype = getattr(torch, unscaled_dtype(network.config.store.dtype))
    machine = describe_machine(network.device)
    with (
        ProgressDisplay("questions", sum(len(work.ids) for work in works), "questions") as display,
        BackgroundShardWriter(store, max_errors=0) as writer,
    ):
        for work, uncommitted in writer.leases(works):
            rows: dict[str, dict[str, torch.Tensor]] = {}
            for start in range(0, len(uncommitted), TEXT_BATCH):
                batch = uncommitted[start : start + TEXT_BATCH]
                rows |= _encode_text_batch(network.encoder, network.tokenizer, batch, network.device, dtype)
                display.advance(len(batch))
            sources = {text: hashlib.sha256(text.encode()).hexdigest() for text in rows}
            writer.write(EncodedShard(work, machine, rows, sources))
        writer.wait()


def _encode_text_batch(
    encoder: TextEncoder, tokenizer: Tokenizer, texts: Sequence[str], device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    # Always the same shape; `extract.worker.batch_encoder` gives the reason.
    ids, mask = tokenizer([*texts, *[texts[-1]] * (TEXT_BATCH - len(texts))])
    with torch.inference_mode():
        states = encoder(ids.to(device), mask.to(device)).to(dtype).cpu()
    return {text: {"states": states[i], "attention_mask": mask[i].bool()} for i, text in enumerate(texts)}
