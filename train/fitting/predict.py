"""The answer of a trained head to any question about one stored clip, without annotation files."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets.records import UNKNOWN_ANSWERS
from egopatch.features import FingerprintMismatch, Store
from egopatch.train.data.batch import Batch
from egopatch.train.data.question_table import FORMS, NO_CLASS
from egopatch.train.fitting.experiment import open_features, pick_device, sizes_of
from egopatch.train.fitting.fit import head_of
from egopatch.train.fitting.stacked_heads import StackedHeads
from egopatch.train.heads import PSA, build_head, reads_video, unwrapped
from egopatch.train.rundir import card as run_folder
from egopatch.train.rundir.card import Card, RunError


@dataclass(frozen=True)
class Prediction:
    """The answers to one question about one clip.

    Attributes:
        clip_id: The clip.
        question: The question.
        answers: Answers and their probabilities, the most probable first.
        frames: Positions of the stored frames that the head reads.
        times_s: Seconds from the start of the clip to each frame that the head reads; empty if the store has none.
        kept: For each of these frames the row-major indices of the patches that psa kept; empty for other heads.
        grid: (rows, cols) of the patches.
        unknown_words: Words of the question that are in no stored question.
    """

    clip_id: str
    question: str
    answers: tuple[tuple[str, float], ...]
    frames: tuple[int, ...]
    times_s: tuple[float, ...]
    kept: tuple[tuple[int, ...], ...]
    grid: tuple[int, int]
    unknown_words: tuple[str, ...]


def predict(config: Config, clip_id: str, question: str, answers: int = 5) -> Prediction:
    """Ask the head in `config.run.dir` a question about a clip of `config.store.path`.

    Args:
        config: The experiment that the head was trained with.
        clip_id: A clip of the store.
        question: Any question; the text network encodes it, unless the store has it already.
        answers: Number of answers to return.

    Raises:
        RunError: There is no trained head in `run.dir`.
        ConfigError: The head reads no video, or chooses among a question's own options; or the store has no such clip.
        FingerprintMismatch: The store or the text network is not the one that the head was trained with.
    """
    folder, device = config.run.dir, pick_device(config.train.device)
    card = Card.read(folder)
    if not reads_video(card.model):
        raise ConfigError(f"run.dir is {folder}, which holds a {card.model} head; expected one that reads video")
    if set(card.answers) <= set(UNKNOWN_ANSWERS):
        raise ConfigError(f"run.dir is {folder}, whose head chooses among options; expected one trained on answers")
    config = replace(config, head=head_of(card, config.head), train=replace(config.train, seed=card.seed, ema=0.0))
    store = open_features(config, "patches", card.fingerprint)
    texts = open_features(config, "text", card.text_fingerprint)
    if clip_id not in store.clip_ids:
        raise ConfigError(_no_clip(store, clip_id))
    sizes = sizes_of(store, texts, len(card.answers), 0)
    head = build_head(config, sizes).to(device)
    heads = StackedHeads([head], [card.seed], config.train, 0, device)
    try:
        heads.load_weights(0, run_folder.load_weights(folder, card.best_epoch))
    except ValueError as error:
        raise RunError(f"{folder / run_folder.WEIGHTS} does not fit a {card.model} head: {error}") from error
    states, mask = _text_states(config, texts, question)
    tokens = store.read([clip_id]).to(device)
    first = torch.zeros(1, dtype=torch.long, device=device)
    batch = Batch(
        stored=tokens,
        clip_rows=None,
        clip_index=first,
        states=states.to(device),
        mask=mask.to(device),
        text_index=first,
        forms=first + FORMS.index("open"),
        answers=first + NO_CLASS,
        rows=torch.zeros(1, dtype=torch.long),
    )
    logits, kept = heads.logits(batch, 0)
    psa = unwrapped(head)
    frames = tuple(psa.frame_indices) if isinstance(psa, PSA) else tuple(range(sizes.frames))
    times_s = [] if tokens.timestamps is None else tokens.timestamps[0].tolist()
    return Prediction(
        clip_id=clip_id,
        question=question,
        answers=_ranked(logits[0, 0], card.answers)[:answers],
        frames=frames,
        times_s=tuple(times_s[frame] for frame in frames) if times_s else (),
        kept=() if kept is None else tuple(tuple(frame.nonzero()[:, 0].tolist()) for frame in kept[0, 0].cpu()),
        grid=sizes.grid,
        unknown_words=_unknown_words(question, texts.clip_ids),
    )


def _ranked(logits: Tensor, vocabulary: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """The answers by falling probability, without the two that stand for unknown ones."""
    ranked = zip(vocabulary, logits.float().softmax(dim=-1).tolist(), strict=True)
    known = [(answer, share) for answer, share in ranked if answer not in UNKNOWN_ANSWERS]
    return tuple(sorted(known, key=lambda pair: -pair[1]))


def _text_states(config: Config, store: Store, question: str) -> tuple[Tensor, Tensor]:
    """States [1, L, D] and mask [1, L] of the question, from the store if it has them."""
    if question in store.clip_ids:
        read = store.read_text([question])
        return read.states, read.attention_mask
    # Imported here, because a stored question needs no network.
    from egopatch.extract.run import encode_questions

    fingerprint, rows = encode_questions(config, [question])
    if different := store.fingerprint.differences(fingerprint, "store has", "config gives"):
        raise FingerprintMismatch(
            f"the config's text network is not that of store {store.path} ({'; '.join(different)}); use the config "
            "that the store was encoded with"
        )
    return rows[question]["states"][None], rows[question]["attention_mask"][None]


def _unknown_words(question: str, texts: Sequence[str]) -> tuple[str, ...]:
    known = {word for text in texts for word in _words(text)}
    return tuple(dict.fromkeys(word for word in _words(question) if word not in known))


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def _no_clip(store: Store, clip_id: str) -> str:
    close = difflib.get_close_matches(clip_id, store.clip_ids, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {len(store.clip_ids)}, such as {store.clip_ids[0]!r}"
    return f"--clip is {clip_id!r}, which is not in store {store.path}; {hint}"
