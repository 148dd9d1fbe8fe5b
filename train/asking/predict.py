"""One question about one clip of an open store, for notebooks and scripts."""

import dataclasses
from pathlib import Path

from egopatch.configs.schema import ConfigError
from egopatch.features import Store
from egopatch.features.values.errors import require_type
from egopatch.train.asking.choose import best_run, config_of_run
from egopatch.train.fitting.predict import Prediction, predict_clips

RUNS = Path("runs")


def predict(store: Store, clip_id: str, question: str, run: str | Path | None = None, answers: int = 5) -> Prediction:
    """Ask a trained head a question about a clip of `store`.

    Args:
        store: Features with the settings that the head was trained on.
        clip_id: A clip of the store.
        question: Any question; the text network encodes it, unless the store has it already.
        run: Folder of the trained head; by default the best one below `runs` that was trained on such features, real
            encoder weights before random ones.
        answers: Number of answers to return.

    Raises:
        TypeError: `store` is not an open store, `clip_id` or `question` not text, or `answers` not a whole number.
        RunError: There is no trained head in `run`, or none below `runs`.
        ConfigError: `question` is empty or `answers` below 1; the head reads no video, or chooses among a question's
            own options; or the store has no such clip.
        FingerprintMismatch: The store or the text network is not the one that the head was trained with.
    """
    require_type("store", store, Store, "an open store: open_store(path)")
    require_type("clip_id", clip_id, str, "the id of one clip; store.clip_ids lists them")
    require_type("question", question, str, "text")
    require_type("answers", answers, int, "a whole number")
    if answers < 1:
        raise ConfigError(f"answers is {answers}; expected a number of at least 1")
    config = config_of_run(best_run([RUNS], features=store.fingerprint) if run is None else Path(run))
    config = dataclasses.replace(
        config, store=dataclasses.replace(config.store, path=str(store.catalog.storage.full_location))
    )
    return predict_clips(config, [clip_id], question, answers)[0]
