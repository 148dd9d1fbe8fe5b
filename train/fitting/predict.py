"""Answers any question about stored clips with a trained head, without annotation files."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from egopatch.configs.experiment_line import UNNAMED
from egopatch.configs.schema import Config, ConfigError
from egopatch.extract.datasets.records import UNKNOWN_ANSWERS
from egopatch.features import Fingerprint, FingerprintMismatch, PatchTokens, Store, StoreError, store_exists
from egopatch.features.common.units import counted
from egopatch.features.store.text_substore import TEXT_FOLDER
from egopatch.features.values.location import parse_location
from egopatch.train.data.batch import Batch
from egopatch.train.data.question_table import FORMS, NO_CLASS
from egopatch.train.fitting.experiment import caller_state_kept, open_features, pick_device, sizes_of
from egopatch.train.fitting.trained import open_head, require_answers, require_video, trained_config
from egopatch.train.heads import PSA, unwrapped
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.names import CONFIG

CLIPS_AT_ONCE = 16


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
        unknown_words: Words of the question that are in no stored question; None where no questions are stored.
        cut: Whether the question fills `text.max_length` tokens, so that the head does not read words beyond them.
    """

    clip_id: str
    question: str
    answers: tuple[tuple[str, float], ...]
    frames: tuple[int, ...]
    times_s: tuple[float, ...]
    kept: tuple[tuple[int, ...], ...]
    grid: tuple[int, int]
    unknown_words: tuple[str, ...] | None
    cut: bool

    def when(self, index: int) -> str:
        """The time of `frames[index]` as text, or its number if the store has no times."""
        return f"{self.times_s[index]:.2f} s" if self.times_s else f"frame {self.frames[index]}"


def predict_clips(config: Config, clip_ids: Sequence[str], question: str, answers: int = 5) -> tuple[Prediction, ...]:
    """Ask the head in `config.run.dir` one question about clips of `config.store.path`; the predictions are in order.

    Args:
        config: The experiment that the head was trained with; the store may be another one of the same settings.
        question: Any question; the text network encodes it, unless a store has it already.
        answers: Number of answers to return for each clip.

    Raises:
        RunError: There is no trained head in `run.dir`, or its files are damaged or from different trainings.
        ConfigError: The question is empty; the head reads no video, or chooses among a question's own options; or the
            store has no such clip.
        FingerprintMismatch: The store or the text network is not the one that the head was trained with.
        StoreError: The store has no clips.
    """
    if not question.strip():
        raise ConfigError('question is empty; expected a question, such as "what is on the table?"')
    folder, device = config.run.dir, pick_device(config.train.device)
    card = Card.read(folder)
    require_video(folder, card)
    require_answers(folder, card)
    config = trained_config(config, card)
    store = open_features(config, "patches", card.fingerprint)
    known = set(store.clip_ids)
    absent = next((name for name in clip_ids if name not in known), None)
    if not known and absent not in store.quarantine:
        raise StoreError(_no_clips(store))
    if absent is not None:
        raise ConfigError(_no_clip(store, absent))
    with caller_state_kept(config.train.device):
        texts = _text_store(config, card)
        states, mask = (tensor.to(device) for tensor in _text_states(config, card, texts, question))
        sizes = sizes_of(store, None, len(card.answers), 0)
        head, heads = open_head(config, folder, card, replace(sizes, text_width=states.shape[-1]), device)
        psa = unwrapped(head)
        frames = tuple(psa.frame_indices) if isinstance(psa, PSA) else tuple(range(sizes.frames))
        unknown = None if texts is None else _unknown_words(question, texts.clip_ids)
        predictions: list[Prediction] = []
        for start in range(0, len(clip_ids), CLIPS_AT_ONCE):
            names = clip_ids[start : start + CLIPS_AT_ONCE]
            tokens = store.read(names).to(device)
            logits, kept = heads.logits(_batch(tokens, states, mask), 0)
            for row, name in enumerate(names):
                times_s = [] if tokens.timestamps is None else tokens.timestamps[row].tolist()
                prediction = Prediction(
                    clip_id=name,
                    question=question,
                    answers=_ranked(logits[0, row], card.answers)[:answers],
                    frames=frames,
                    times_s=tuple(times_s[frame] for frame in frames) if times_s else (),
                    kept=() if kept is None else _positions(kept[0, row].cpu()),
                    grid=sizes.grid,
                    unknown_words=unknown,
                    cut=bool(mask.all()),
                )
                predictions.append(prediction)
    return tuple(predictions)


def _batch(tokens: PatchTokens, states: Tensor, mask: Tensor) -> Batch:
    """A batch that asks one question, given as states and mask, about each clip of `tokens`."""
    each = torch.arange(len(tokens.cls), device=tokens.cls.device)
    same = torch.zeros_like(each)
    return Batch(
        stored=tokens,
        clip_rows=None,
        clip_index=each,
        states=states,
        mask=mask,
        text_index=same,
        forms=same + FORMS.index("open"),
        answers=same + NO_CLASS,
        rows=each.cpu(),
    )


def _positions(kept: Tensor) -> tuple[tuple[int, ...], ...]:
    """For each frame the indices of the patches that are true in `kept` [T, N]."""
    return tuple(tuple(frame.nonzero()[:, 0].tolist()) for frame in kept)


def _ranked(logits: Tensor, vocabulary: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """The answers by falling probability, without the two that mean an unknown answer."""
    ranked = zip(vocabulary, logits.float().softmax(dim=-1).tolist(), strict=True)
    known = [(answer, share) for answer, share in ranked if answer not in UNKNOWN_ANSWERS]
    return tuple(sorted(known, key=lambda pair: -pair[1]))


def _text_store(config: Config, card: Card) -> Store | None:
    """The text substore of the config's store, or else that of the store that the head was trained on, if it exists."""
    for path in (config.store.path, (card.config.get("store") or {}).get("path", config.store.path)):
        if store_exists(parse_location(path) / TEXT_FOLDER):
            store = replace(config.store, path=path)
            return open_features(replace(config, store=store), "text", card.text_fingerprint)
    return None


def _text_states(config: Config, card: Card, store: Store | None, question: str) -> tuple[Tensor, Tensor]:
    """States [1, L, D] and mask [1, L] of the question, from the store if it has them."""
    if store is not None and question in store.clip_ids:
        read = store.read_text([question])
        return read.states, read.attention_mask
    # Imported here, because a stored question needs no network.
    from egopatch.extract.texts import encode_questions

    fingerprint, rows = encode_questions(config, [question])
    trained_on = fingerprint if card.text_fingerprint is None else Fingerprint(card.text_fingerprint)
    if different := trained_on.differences(fingerprint, "head has", "config gives"):
        raise FingerprintMismatch(
            f"the config's text network is not the one that the head in {config.run.dir} was trained with "
            f"({'; '.join(different)}); use the head's own config, {config.run.dir / CONFIG}"
        )
    return rows[question]["states"][None], rows[question]["attention_mask"][None]


def _unknown_words(question: str, texts: Sequence[str]) -> tuple[str, ...]:
    known = {word for text in texts for word in _words(text)}
    return tuple(dict.fromkeys(word for word in _words(question) if word not in known))


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def _no_clips(store: Store) -> str:
    if not store.quarantine:
        return f"store {store.path} has no clips; run `egopatch extract run {UNNAMED}` to encode some"
    clip_id, failed = next(iter(store.quarantine.items()))
    return (
        f"store {store.path} has no clips except {len(store.quarantine)} in quarantine, such as {clip_id!r}: "
        f"{failed.reason}; run `egopatch extract retry {UNNAMED}` to try them again"
    )


def _no_clip(store: Store, clip_id: str) -> str:
    if (failed := store.quarantine.get(clip_id)) is not None:
        return f"clip {clip_id!r} is in quarantine: {failed.reason}"
    close = difflib.get_close_matches(clip_id, store.clip_ids, n=1)
    hint = (
        f"did you mean {close[0]!r}?"
        if close
        else f"it has {counted(len(store.clip_ids), 'clip')}, such as {store.clip_ids[0]!r}"
    )
    return f"clip {clip_id!r} is not in store {store.path}; {hint}"
