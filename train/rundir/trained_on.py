"""Records what a run was trained on: `clips.json` and `questions.json` in its folder.

`extract run --refresh` replaces a clip's row. A run that was trained on the former row is not resumed, which would mix
the two, and not evaluated, which would suggest that its head was trained on the present annotations.

Annotations may change in place. A run that learned from the former ones can be evaluated, but it cannot be a seed or
setting of a sweep whose other runs learn from the present ones.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from egopatch.extract.datasets import Question
from egopatch.features import Store
from egopatch.features.common.units import counted
from egopatch.features.io.fields import Record, get_count, get_field
from egopatch.train.rundir.checked_json import read_object
from egopatch.train.rundir.names import CLIPS, QUESTIONS
from egopatch.train.rundir.results import START_AGAIN
from egopatch.train.rundir.run_folder import RunError, write_whole

# Number and digest of the answers and of each kind of questions, by name.
DataRecord = Mapping[str, tuple[int, str]]


def clip_versions(store: Store, names: Collection[str]) -> dict[str, str]:
    """Digest of video and stretch by id, for the clips in `names` that are encoded.

    Values are left out: the same clips, encoded on another machine, may differ in their last bits.
    """
    ledger = store.catalog.ledger
    origins = ledger.origins([name for name in names if name in ledger.clips])
    versions = {}
    for name, origin in origins.items():
        stretch = (None, None) if origin is None else (origin.start_s, origin.end_s)
        versions[name] = _digest([ledger.clips[name].clip(name).source, *stretch])
    return versions


def write_clips(folder: Path, versions: Mapping[str, str]) -> None:
    """Write `clips.json` of a run that starts to train on these `clip_versions`, which precede reading the clips."""
    write_whole(folder / CLIPS, json.dumps(versions, indent=0) + "\n")


def changed_clips(folder: Path, store: Store) -> list[str]:
    """The clips that were encoded again, or removed, since the run in `folder` started to train on them.

    The list is also empty for runs of earlier versions, which wrote no `clips.json`.

    Raises:
        RunError: `clips.json` is damaged.
    """
    recorded = _read(folder / CLIPS)
    now = clip_versions(store, recorded)
    return [name for name, version in recorded.items() if now.get(name) != version]


def require_same_clips(folder: Path, store: Store) -> None:
    """Refuse a run whose training clips were encoded again or removed since.

    Raises:
        RunError: `changed_clips` finds some, or `clips.json` is damaged.
    """
    if changed := changed_clips(folder, store):
        clips = counted(len(changed), f"clip of {store.path} was", f"clips of {store.path} were")
        raise RunError(
            f"{folder}: {clips} encoded again or removed after this run had been trained on them, such as "
            f"{changed[0]!r}; train again in another folder (egopatch train fit --config CONFIG --run.dir FOLDER, or a "
            "sweep with another --name), or delete this one"
        )


def record_data(answers: Sequence[str], questions: Mapping[str, Sequence[Question]]) -> DataRecord:
    """Record everything that determines the classes, batches and accuracies of a training.

    Args:
        answers: The answer vocabulary, in the order of the classes.
        questions: Questions by name of their kind, in the order of their table.
    """
    values: dict[str, list[Any]] = {"answers": list(answers)}
    for kind, rows in questions.items():
        values[kind] = [(q.question_id, q.clip_id, q.text, q.answer, q.form, q.options, q.variants) for q in rows]
    return {kind: (len(rows), _digest(rows)) for kind, rows in values.items()}


def changed_data(saved: DataRecord, now: DataRecord) -> list[str]:
    """Lines that describe what has changed between two records, such as `train questions: 96 then, 80 now`."""
    lines = []
    for kind in dict.fromkeys([*saved, *now]):
        (then, digest_then), (count, digest) = saved.get(kind, (0, "")), now.get(kind, (0, ""))
        if then != count:
            lines.append(f"{kind}: {then} then, {count} now")
        elif digest_then != digest:
            lines.append(f"{kind}: {count} then and now, but not the same ones or not in the same order")
    return lines


def write_questions(folder: Path, record: DataRecord) -> None:
    """Write `questions.json` of a run that starts to train on the answers and questions of `record`."""
    entries = {kind: {"n": count, "digest": digest} for kind, (count, digest) in record.items()}
    write_whole(folder / QUESTIONS, json.dumps(entries, indent=1) + "\n")


def require_same_questions(folder: Path, record: DataRecord, root: Path) -> None:
    """Refuse a finished run of a sweep that learned from other answers or questions than those of `record`.

    Runs of earlier versions, which wrote no `questions.json`, are not refused.

    Args:
        record: Record of the present answers and questions, as from `record_data`.
        root: `data.root`.

    Raises:
        RunError: They differ, or `questions.json` is damaged.
    """
    saved = _read_questions(folder)
    if saved and (changed := changed_data(saved, record)):
        raise RunError(
            f"{folder} was trained on different data ({'; '.join(changed)}), but all runs of a sweep must share their "
            f"data; restore the annotations in {root}, or the store if clips were encoded since; otherwise train again "
            "with another --name, or delete this folder"
        )


def require_shared_questions(folders: Sequence[Path]) -> None:
    """Refuse finished runs of a sweep that did not all learn from the same answers and questions.

    Raises:
        RunError: As `require_same_questions`, which compares each run with the present annotations.
    """
    records = {folder: record for folder in folders if (record := _read_questions(folder))}
    for folder, record in records.items():
        first, expected = next(iter(records.items()))
        kinds = [kind for kind in dict.fromkeys([*expected, *record]) if record.get(kind) != expected.get(kind)]
        if kinds:
            raise RunError(
                f"{folder} and {first} were trained on different data (different: {', '.join(kinds)}), but all "
                "runs of a sweep must share their data; delete one of the folders, and run the sweep again"
            )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _read_questions(folder: Path) -> DataRecord:
    path = folder / QUESTIONS
    entries = _read(path)
    try:
        return {kind: (get_count(entry, "n"), get_field(entry, "digest", str)) for kind, entry in entries.items()}
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); {START_AGAIN}") from None


def _read(path: Path) -> Record:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); {START_AGAIN}") from None
