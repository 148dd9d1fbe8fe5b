"""Question texts: their frozen network, and the rows that it computes for a store's text substore."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from egopatch.configs.schema import Config, ConfigError
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
from egopatch.extract.worker.device import describe_machine, device_of, full_float32, shortage_explained
from egopatch.extract.writing.shard_writer import BackgroundShardWriter, EncodedShard
from egopatch.features import Fingerprint, ShardWork, Store, StoreSpec, create_store, open_store, store_exists
from egopatch.features.common.progress import ProgressDisplay
from egopatch.features.store.text_substore import TEXT_FOLDER
from egopatch.features.values.location import parse_location
from egopatch.features.values.spec import unscaled_dtype

TEXT_BATCH = 64


@dataclass(frozen=True)
class TextNetwork:
    """The frozen text network, with its checkpoint.

    Tokenizer and encoder are loaded at their first use, because that takes seconds and most runs find every text
    stored. Using them raises CheckpointError, ConfigError and JobFailed, as `extract_together` does.
    """

    config: Config
    network: Network
    device: torch.device
    checkpoint: Checkpoint

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `text.model`."""
        return load_tokenizer(self.config.text.model, self.config.text.max_length)

    @cached_property
    def encoder(self) -> TextEncoder:
        """The encoder, on the device."""
        encoder = load_text_encoder(self.network, self.checkpoint, text_depth(self.config)).eval()
        self._try_longest_text(encoder)
        with shortage_explained(None):
            return encoder.to(self.device)

    def require_known(self, ids: torch.Tensor, encoder: TextEncoder) -> None:
        """Refuse another network's tokenizer, while a CPU can still say so: a GPU ends the process at such a token."""
        if encoder.words is not None and (highest := int(ids.max())) >= encoder.words:
            raise ConfigError(
                f"text.model is {self.config.text.model!r}, whose tokenizer gives a text token {highest}, but the text "
                f"network of {self.checkpoint.path} knows tokens 0 to {encoder.words - 1}; set text.model to the "
                "tokenizer that this network was trained with"
            )

    def _try_longest_text(self, encoder: TextEncoder) -> None:
        """Refuse a `text.max_length` that the network has no positions for, while a CPU can still say so."""
        length = self.config.text.max_length
        ids, mask = self.tokenizer([" ".join(["what"] * length)])
        self.require_known(ids, encoder)
        try:
            encoder(ids, mask)
        except (IndexError, RuntimeError) as error:
            try:
                encoder(ids[:, :2], mask[:, :2])
            except Exception:  # so the length is not the cause
                raise error from None
            reason = " ".join(str(error).split())[:100]
            raise ConfigError(
                f"text.max_length is {length}, and the text network of {self.checkpoint.path} takes no text of so many "
                f"tokens ({reason}); expected at most its number of positions: 512 for most, 77 for CLIP, 64 for SigLIP"
            ) from error

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of the text substore."""
        return text_fingerprint(self.config, self.network, self.checkpoint.sha256)

    @cached_property
    def spec(self) -> StoreSpec:
        """The substore's arrays; tokenizer and encoder are loaded unless this network has already created it."""
        config = self.config
        path = parse_location(config.store.path) / TEXT_FOLDER
        stored = open_store(path) if store_exists(path) else None
        if stored is not None and stored.fingerprint == self.fingerprint:
            width = stored.spec.array("states").shape[-1]
        else:
            _, width = self.tokenizer, self.encoder.width
        return StoreSpec.for_text(config.text.max_length, width, config.store.dtype, codec=config.store.codec)


def find_text_network(config: Config, network: Network, device: torch.device, video: Checkpoint | None) -> TextNetwork:
    """The text network of `config.text` for `device`; where it has no file of its own, its weights come from `video`.

    Raises:
        CheckpointError, ConfigError: As for `extract_together`.
    """
    return TextNetwork(config, network, device, open_text_checkpoint(network, video, config.text.model))


def create_text_store(network: TextNetwork, texts: Sequence[str]) -> Store:
    """The text substore, with a row for each of `texts`."""
    store = network.config.store
    path = parse_location(store.path) / TEXT_FOLDER
    return create_store(path, network.spec, network.fingerprint, texts, format=store.format)


def encode_questions(config: Config, texts: Sequence[str]) -> tuple[Fingerprint, dict[str, dict[str, torch.Tensor]]]:
    """The fingerprint of the text substore, and the rows that a run would store there for `texts`, at most 64.

    Raises:
        CheckpointError, ConfigError, JobFailed: As for `extract_together`.
    """
    network = find_network(config.encoder.arch)
    video = open_checkpoint(network, config.encoder.checkpoint) if network.text_weights is None else None
    loaded = find_text_network(config, network, device_of(config.encoder.device), video)
    return loaded.fingerprint, _encode_text_batch(loaded, texts)


def cut_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The `texts` that fill all `text.max_length` tokens, so that the network may not read their ends."""
    cut: list[str] = []
    for start in range(0, len(texts), TEXT_BATCH):
        batch = texts[start : start + TEXT_BATCH]
        cut += [text for text, mask in zip(batch, tokenizer(batch)[1], strict=True) if mask.all()]
    return cut


def encode_texts(network: TextNetwork, store: Store, works: Sequence[ShardWork]) -> None:
    """Encode question texts, except those in shards that other processes hold."""
    machine = describe_machine(network.device)
    with (
        ProgressDisplay("questions", sum(len(work.ids) for work in works), "questions") as display,
        BackgroundShardWriter(store, max_errors=0) as writer,
    ):
        for work, uncommitted in writer.leases(works):
            rows: dict[str, Mapping[str, torch.Tensor]] = {}
            for start in range(0, len(uncommitted), TEXT_BATCH):
                batch = uncommitted[start : start + TEXT_BATCH]
                rows |= _encode_text_batch(network, batch)
                display.advance(len(batch))
            sources = {text: hashlib.sha256(text.encode()).hexdigest() for text in rows}
            writer.write(EncodedShard(work, machine, rows, sources))
        writer.wait()


def _encode_text_batch(network: TextNetwork, texts: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    # Always the same shape; `extract.worker.batch_encoder` gives the reason.
    ids, mask = network.tokenizer([*texts, *[texts[-1]] * (TEXT_BATCH - len(texts))])
    network.require_known(ids, network.encoder)
    dtype = getattr(torch, unscaled_dtype(network.config.store.dtype))
    with shortage_explained(None), torch.inference_mode(), full_float32():
        states = network.encoder(ids.to(network.device), mask.to(network.device)).to(dtype).cpu()
    return {text: {"states": states[i], "attention_mask": mask[i].bool()} for i, text in enumerate(texts)}
