"""The model card of a run, `card.json`."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egopatch.extract.datasets.records import UNKNOWN_ANSWERS
from egopatch.train.rundir.checked_json import read_object, require_head_fields
from egopatch.train.rundir.names import CARD, TEST
from egopatch.train.rundir.results import START_AGAIN
from egopatch.train.rundir.run_folder import RunError, is_finished, write_whole


@dataclass(frozen=True)
class Card:
    """Describes a head's weights: enough to open the right store, build the head and read its answers.

    Attributes:
        model: The value of `head.name`.
        config: The resolved config.
        fingerprint: Fingerprint of the store of clips; None for heads that read no video.
        text_fingerprint: Fingerprint of the text substore; None for heads that read no text.
        answers: The answer vocabulary; the index is the class.
        seed: Seed of the training.
        best_epoch: Number, counted from 1, of the epoch that was best on *val*.
        val: Accuracies of that epoch in percent: `open`, `binary`, `all`.
        versions: Versions of Python and the libraries that computed the weights.
        command: Command that trained the head.
        parameters: Number of learned parameters in the head.
        synthetic: Whether the data set of the config is rendered; None in the cards of earlier versions.
        trained_on: Section `data` of the config that the head was trained with, if it differs from that of `config`
            (`train evaluate --from`); else None.
    """

    model: str
    config: Mapping[str, Any]
    fingerprint: Mapping[str, Any] | None
    text_fingerprint: Mapping[str, Any] | None
    answers: tuple[str, ...]
    seed: int
    best_epoch: int
    val: Mapping[str, float | None]
    versions: Mapping[str, str]
    command: str
    parameters: int
    synthetic: bool | None = None
    trained_on: Mapping[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write `card.json`."""
        write_whole(folder / CARD, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Read `card.json`.

        Raises:
            RunError: The file is missing or damaged.
        """
        path = folder / CARD
        try:
            values = read_object(path)
            require_head_fields(values)
            return cls(**values | {"answers": tuple(values["answers"])})
        except FileNotFoundError:
            if is_finished(folder):
                raise RunError(
                    f"{path}: no such file, but the run has finished ({TEST} beside it); {START_AGAIN}"
                ) from None
            raise RunError(f"{path}: no such file; train the head first: egopatch train fit --config CONFIG") from None
        except (ValueError, TypeError) as error:
            raise RunError(f"{path} is not a model card ({error}); {START_AGAIN}") from None


def chooses_options(answers: Collection[str]) -> bool:
    """Whether the head of a card with these `answers` chooses among a question's own options: it has no vocabulary but
    the entries for unknown answers.
    """
    return set(answers) <= set(UNKNOWN_ANSWERS)
