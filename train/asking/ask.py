"""Asks one question about the clips of a video or store: ranked answers, and notes on how far to trust them."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egopatch.configs.schema import Config
from egopatch.features import open_store
from egopatch.features.common.units import counted
from egopatch.train.asking.videos import encode_video
from egopatch.train.fitting.predict import Prediction, predict_clips
from egopatch.train.fitting.trained import require_answers
from egopatch.train.report.table import is_standin, is_synthetic
from egopatch.train.rundir.card import Card


@dataclass(frozen=True)
class AskResult:
    """The answers to one question.

    Attributes:
        config: Experiment of the clips' store.
        predictions: A prediction for each clip, the most certain first; for a video's clips, times are seconds from the
            start of the file.
        encoded: Number of clips that had to be encoded.
        notes: One line for each reason to distrust the answers, and one if clips could not be decoded.
        default_picture: File for the picture if the user names none; None draws no picture.
    """

    config: Config
    predictions: tuple[Prediction, ...]
    encoded: int
    notes: tuple[str, ...]
    default_picture: Path | None = None

    def lines(self) -> Iterator[str]:
        """The answers as text: for each clip its answers, then each frame with the number of patches kept."""
        for prediction in self.predictions:
            if len(self.predictions) > 1:
                yield f"clip {prediction.clip_id}"
            for answer, probability in prediction.answers:
                yield f"{100 * probability:5.1f}%  {answer}"
            for index, patches in enumerate(prediction.kept):
                patches_of_frame = prediction.grid[0] * prediction.grid[1]
                yield f"{prediction.when(index)}: kept {len(patches)} of {patches_of_frame} patches"
        yield f"head: {self.config.run.dir}"
        for note in self.notes:
            yield f"note: {note}"

    def as_dict(self) -> dict[str, Any]:
        """The fields of the best clip's prediction as top-level keys, and the predictions of all clips in `clips`."""
        clips = [dataclasses.asdict(prediction) for prediction in self.predictions]
        return {
            **clips[0],
            "clips": clips,
            "run": str(self.config.run.dir),
            "encoded": self.encoded,
            "notes": list(self.notes),
        }


def ask_video(
    experiment: Config, video: Path, question: str, clip_s: float | None, cache: Path, answers: int
) -> AskResult:
    """Ask the head in `experiment.run.dir` about a video file or a folder of videos.

    Args:
        experiment: Config that the head was trained with.
        video: The file or folder, which is encoded unless `cache` has its features.
        question: Any question.
        clip_s: Length of the clips in seconds; None makes each video one clip.
        cache: Folder of cached features.
        answers: Number of answers for each clip.

    Raises:
        DatasetError, StoreError, CheckpointError: As `encode_video`.
        RunError, ConfigError, FingerprintMismatch: As `predict_clips`.
    """
    card = Card.read(experiment.run.dir)
    require_answers(experiment.run.dir, card)  # before a video is encoded for nothing
    encoded = encode_video(video, experiment, card, clip_s, cache)
    predictions = _ranked(predict_clips(encoded.config, list(encoded.clips), question, answers))
    starts = {name: clip.start_s or 0.0 for name, clip in encoded.clips.items()}
    notes = list(_doubts(card, predictions[0]))
    if encoded.quarantined:
        name, reason = next(iter(encoded.quarantined.items()))
        notes.append(f"{counted(len(encoded.quarantined), 'clip')} cannot be decoded, such as {name} ({reason})")
    return AskResult(
        encoded.config,
        tuple(dataclasses.replace(p, times_s=tuple(t + starts[p.clip_id] for t in p.times_s)) for p in predictions),
        encoded.encoded,
        tuple(notes),
        encoded.folder / "answer.jpg",
    )


def ask_clips(config: Config, clip_id: str | None, question: str, answers: int) -> AskResult:
    """Ask the head in `config.run.dir` about one clip of `config.store.path`, or about all of them."""
    names = open_store(config.store.path).clip_ids if clip_id is None else (clip_id,)
    predictions = _ranked(predict_clips(config, names, question, answers))
    return AskResult(config, predictions, 0, tuple(_doubts(Card.read(config.run.dir), predictions[0])))


def _ranked(predictions: tuple[Prediction, ...]) -> tuple[Prediction, ...]:
    return tuple(sorted(predictions, key=lambda prediction: -prediction.answers[0][1]))


def _doubts(card: Card, prediction: Prediction) -> Iterator[str]:
    """Reasons to distrust an answer, one line each."""
    values = dataclasses.asdict(card)
    if is_standin(values):
        yield "the encoder's weights are random stand-ins, so the answer says nothing about the video"
    if is_synthetic(values):
        yield "the head was trained on EgoSynth's rendered videos, so its answers say nothing about recorded ones"
    if prediction.cut:
        yield "the question reaches the limit (text.max_length), so its end may be cut off: ask a shorter one"
    if prediction.unknown_words is None:
        yield "the head's training questions are not stored here, so some of these words may be unknown to it"
    elif prediction.unknown_words:
        words = ", ".join(map(repr, prediction.unknown_words))
        yield f"no stored question has the words {words}, so the head was not trained on them"
