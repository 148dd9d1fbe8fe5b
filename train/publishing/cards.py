"""The `README.md` of a head and of a store, with the front matter that Hugging Face's hub reads."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from egopatch.features.common.units import counted, format_bytes
from egopatch.features.store.store import Store
from egopatch.train.publishing.origins import Origin
from egopatch.train.report.table import is_standin, is_synthetic
from egopatch.train.rundir.card import Card
from egopatch.train.rundir.results import COLUMNS, card_option
from egopatch.train.scores.metrics import Score

TASK = "visual-question-answering"


def head_card(card: Card, scores: Mapping[str, Score], found: Sequence[Origin], files: Sequence[Path]) -> str:
    """The card of a trained head.

    Args:
        scores: Accuracies on *test*, over open, binary and all questions.
        found: Where weights and data come from.
        files: Files that the folder holds.
    """
    name = f"{card.model} on {_data_name(card)}"
    measured = [(part, scores[part].n, accuracy) for part in COLUMNS if (accuracy := scores[part].accuracy) is not None]
    metrics = [
        {"type": "accuracy", "name": f"accuracy, {part} (n {n})", "value": round(accuracy, 2)}
        for part, n, accuracy in measured
    ]
    shown = ", ".join(f"{part} {accuracy:.2f} (n {n})" for part, n, accuracy in measured)
    dataset = {"type": _data_name(card).lower(), "name": _data_name(card), "split": "test"}
    front = {
        "library_name": "egopatch",
        "pipeline_tag": TASK,
        "tags": ["egocentric-video"],
        "model-index": [
            {"name": name, "results": [{"task": {"type": TASK}, "dataset": dataset, "metrics": metrics}]},
        ],
    }
    return _text(
        card,
        front,
        name,
        [
            f"A head of EgoPatch with {card.parameters:,} parameters, trained on stored features of a frozen encoder. "
            "It needs a store with the fingerprint below.",
            f"Accuracy on test in percent: {shown or 'unknown, because no answers are published'}. "
            f"Epoch {card.best_epoch} was chosen on val; seed {card.seed}.",
            f"Trained by `{card.command}` with {', '.join(f'{k} {v}' for k, v in card.versions.items())}.",
            "## Origin and terms\n\n" + _origins(found),
            "## Fingerprint of the features\n\n" + _fields(card.fingerprint or {"none": "this head reads no video"}),
            "## Files\n\n" + _files(files),
        ],
    )


def store_card(store: Store, card: Card, found: Sequence[Origin]) -> str:
    """The card of a store of features; arguments as in `head_card`."""
    clips = len(store.clip_ids)
    front = {
        "pretty_name": f"Features of {_data_name(card)}",
        "task_categories": [TASK],
        "tags": ["egopatch", "features"],
        "size_categories": [_size_category(clips)],
    }
    return _text(
        card,
        front,
        f"Patch features of {counted(clips, 'clip')}",
        [
            f"```text\n{store.summary('features')}\n```",
            "The store holds names and hashes of the video files, the stretches that were encoded, and the text of "
            "every question. It holds no video.",
            "## Origin and terms\n\n" + _origins(found),
            "## Fingerprint\n\n" + _fields(store.fingerprint.fields),
            "## Files\n\nThe store is the folder `features`; its `ledger.jsonl` has the size and CRC-32 of every file "
            "with tokens. `egopatch features verify features` reads them all.",
        ],
    )


def _text(card: Card, front: dict[str, Any], title: str, parts: Sequence[str]) -> str:
    """A card with the licence and the warnings that belong to everything made for the head of `card`."""
    plain, warnings = asdict(card), []
    if is_standin(plain):
        front = {**front, "tags": [*front["tags"], "random-weight-stand-in"]}
        warnings.append(
            "**The encoder is a stand-in with random weights.** These files say nothing about the published network."
        )
    if is_synthetic(plain):
        warnings.append("**The videos are rendered (EgoSynth).** These files say nothing about recorded videos.")
    front = {"license": "other", "license_name": "see-below", **front}
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return "\n\n".join([f"---\n{matter}---", f"# {title}", *warnings, *parts]) + "\n"


def _data_name(card: Card) -> str:
    """Name of the data set. EgoSynth has EgoTaskQA's layout and must not be taken for it."""
    return "EgoSynth" if is_synthetic(asdict(card)) else str(card_option(asdict(card), "data", "name"))


def _origins(found: Sequence[Origin]) -> str:
    return "\n".join(f"- {origin.what}. Terms: {origin.terms}" for origin in found)


def _fields(fields: Mapping[str, object]) -> str:
    return "\n".join(f"- {name}: `{value}`" for name, value in fields.items())


def _files(files: Sequence[Path]) -> str:
    return "\n".join(f"- `{path.name}`, {format_bytes(path.stat().st_size)}" for path in files)


def _size_category(clips: int) -> str:
    """The hub's own steps."""
    steps = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
    return next((name for limit, name in steps.items() if clips < limit), "n>10M")
