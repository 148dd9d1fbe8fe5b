"""The adapters of data sets by name, one file each.

Other adapters come from `register_dataset`, and from the entry points `egopatch.datasets` of installed packages, each
of which is a function that `register_dataset` would take.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from egopatch.configs.plugins import Plugins, call_fault, traceback_kept
from egopatch.configs.schema import ConfigError, DataConfig
from egopatch.extract.datasets import egoschema, egotaskqa, jsonl, nextqa, parsing, qaego4d
from egopatch.extract.datasets.records import PARTS, UNKNOWN_ANSWERS, Clip, Dataset, DatasetError, Question, texts_of

Loader = Callable[[DataConfig], Dataset]

LOADERS: dict[str, Loader] = {
    "egoschema": lambda data: egoschema.load(data.root, data.split),
    "egotaskqa": lambda data: egotaskqa.load(data.root, data.split, data.paraphrases),
    "jsonl": lambda data: jsonl.load(data.root / data.clips, _within(data, data.questions), data.root, data.split),
    "nextqa": lambda data: nextqa.load(data.root, data.split),
    "qaego4d": lambda data: qaego4d.load(data.root, data.split, close=False),
    "qaego4d-close": lambda data: qaego4d.load(data.root, data.split, close=True),
}


def _within(data: DataConfig, name: str | None) -> Path | None:
    return None if name is None else data.root / name


def _fault(name: str, load: object) -> str | None:
    return call_fault(load, "data")


_PLUGINS: Plugins[Loader] = Plugins("data.name", "egopatch.datasets", LOADERS.keys(), _fault)


def register_dataset(name: str, load: Loader, replace: bool = False) -> None:
    """Make a data set available under a `data.name` in this process.

    Args:
        name: Value of the option.
        load: Reads clips, questions and answer vocabulary, and opens no video. It raises `DatasetError` for annotations
            that cannot be used.
        replace: Whether to replace what an earlier call registered under the name.

    Raises:
        ConfigError: The name is taken, or `load` cannot be called with one argument.
    """
    _PLUGINS.register(name, load, replace)


def load_dataset(data: DataConfig) -> Dataset:
    """Read the clips, questions and answer vocabulary of a data set. No video is opened.

    Raises:
        DatasetError: `data.root` does not exist, or annotation files are missing or malformed; one line per fault, with
            file and position. Or the parts of a data set from outside this package do not fit together.
        ConfigError: `data.name` is unknown, or its registration is broken.
        RuntimeError: The function of a data set from outside this package raises another ValueError or OSError.
    """
    plugin = _PLUGINS.find(data.name)
    require_root(data)
    if plugin is None:
        dataset = LOADERS[data.name](data)
    else:
        with traceback_kept(f"the data set {data.name}"):
            dataset = plugin(data)
    if not isinstance(dataset, Dataset):
        owner = _PLUGINS.package_of(data.name) or "this process"
        raise ConfigError(
            f"data.name is {data.name!r}, but the function that {owner} registers for it returns a "
            f"{type(dataset).__name__}; expected an extract.datasets.Dataset"
        )
    if plugin is not None:
        if faults := [f"data.name {data.name}: {fault}" for fault in _misfits(dataset)]:
            raise DatasetError(faults)
        dataset = _in_tuples(dataset)
    if data.paraphrases and any(question.variants is None for question in dataset.questions.get("train", ())):
        raise ConfigError(f"data.paraphrases is true, but the data set {data.name} has no paraphrases; set it to false")
    return dataset


def require_root(data: DataConfig) -> None:
    """Check that `data.root` is a folder, which a data set from outside this package may not need.

    Raises:
        DatasetError: It is not a folder.
    """
    if data.name not in LOADERS or data.root.is_dir():
        return
    hint = "`egopatch extract data` downloads EgoTaskQA, `make demo` renders EgoSynth"
    if data.name == "jsonl":
        hint = "if it was moved, replace its old path in the config"
    fault = f"data.root is '{data.root}', which does not exist"
    if data.root.exists():
        fault = f"data.root is '{data.root}', which is not a folder"
    raise DatasetError([f"{fault}; set --data.root to the folder of the annotations ({hint})"])


def load_clips(data: DataConfig) -> tuple[Clip, ...]:
    """The clips of a data set; questions in a file of their own are not read, because there may be a million.

    Raises:
        DatasetError, ConfigError: As `load_dataset`.
    """
    return load_dataset(dataclasses.replace(data, questions=None) if data.name == "jsonl" else data).clips


def _misfits(dataset: Dataset) -> Iterator[str]:
    """Faults of a data set from outside this package; the adapters here check their own where they know the line.

    Without this, training would fail after the job has encoded every clip, or would count right answers as wrong.
    """
    if set(dataset.questions) != set(PARTS):
        yield f"questions has the parts {list(dataset.questions)}; expected {list(PARTS)}, empty tuples included"
        return
    fields = {"clips": dataset.clips, "answers": dataset.answers, "texts": dataset.texts}
    if wrong := [name for name, value in fields.items() if isinstance(value, str) or not isinstance(value, Sequence)]:
        yield from (f"{name} is of type {type(fields[name]).__name__}; expected a tuple" for name in wrong)
        return
    if not _is_text(dataset.split):
        yield f"split is {dataset.split!r:.200}; expected a text, such as data.split"
    if not isinstance(dataset.free_answers, bool):
        yield f"free_answers is {dataset.free_answers!r:.200}; expected True or False"
    # Values of a wrong type cannot be compared, so other faults are looked for only if there are none.
    if wrong := [*_wrong_fields(dataset)]:
        yield from wrong
        return
    if not dataset.clips:
        yield "clips is empty; expected at least one Clip"
    named = {"clip_id": [clip.clip_id for clip in dataset.clips], "answer": dataset.answers, "text": dataset.texts}
    named |= {f"{part} question_id": [question.question_id for question in dataset.questions[part]] for part in PARTS}
    for what, values in named.items():
        yield from (f"{what} {value!r} appears twice; expected each once" for value in _repeated(values))
    clip_ids = set(named["clip_id"])
    questions = [question for part in PARTS for question in dataset.questions[part]]
    for question in questions:
        if not question.answer and not question.options:
            yield f"question {question.question_id!r}: answer is ''; expected an answer, or options"
        if question.clip_id not in clip_ids:
            yield f"question {question.question_id!r}: clip_id {question.clip_id!r} is not in clips; add it there"
    if missing := sorted(set(texts_of(questions)).difference(dataset.texts)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield f"texts lacks {missing[0]!r}{more}; make it with texts_of(questions)"
    if dataset.choices and (classes := [answer for answer in dataset.answers if answer not in UNKNOWN_ANSWERS]):
        yield (
            f"answers contains {classes[0]!r:.200}, but the questions have options; make it with answer_vocabulary([])"
        )
    if any(not question.options for question in questions) and UNKNOWN_ANSWERS[1] not in dataset.answers:
        yield f"answers lacks {UNKNOWN_ANSWERS[1]}; make it with answer_vocabulary(training answers)"


def _in_tuples(dataset: Dataset) -> Dataset:
    """The data set with tuples in place of lists, which equal no tuple and which its function may change later."""
    questions = {part: tuple(dataset.questions[part]) for part in PARTS}
    clips, answers, texts = tuple(dataset.clips), tuple(dataset.answers), tuple(dataset.texts)
    return dataclasses.replace(dataset, clips=clips, questions=questions, answers=answers, texts=texts)


def _repeated(values: Sequence[str]) -> list[str]:
    return [value for value, count in Counter(values).items() if count > 1] if len(set(values)) < len(values) else []


def _wrong_fields(dataset: Dataset) -> Iterator[str]:
    """One line for each field of a clip or a question, and each answer or text, that has an invalid value."""
    if strange := [clip for clip in dataset.clips if not isinstance(clip, Clip)]:
        yield f"clips contains {strange[0]!r:.200}; expected a Clip"
        return
    groups: list[tuple[str, str, Sequence[Clip | Question], Mapping[str, _Field]]] = [
        ("clip", "clip_id", dataset.clips, _CLIP_FIELDS)
    ]
    groups += [(f"{part} question", "question_id", dataset.questions[part], _QUESTION_FIELDS) for part in PARTS]
    for what, id_name, records, fields in groups:
        for name, (fits, expected) in fields.items():
            values = [getattr(record, name) for record in records]
            if not all(fits(value) and _is_usable(value) for value in _distinct(values)):
                named = ((getattr(record, id_name), value) for record, value in zip(records, values, strict=True))
                for record_id, value in named:
                    if not fits(value) or not _is_usable(value):
                        needed = parsing.USABLE if fits(value) else expected
                        yield f"{what} {record_id!r}: {name} is {value!r:.200}; expected {needed}"
    yield from (f"texts contains {text!r:.200}; expected a text" for text in dataset.texts if not isinstance(text, str))
    for answer in dataset.answers:
        if answer not in UNKNOWN_ANSWERS and not (answer and _is_lower(answer)):
            yield f"answers contains {answer!r:.200}; expected {_LOWER}"
        elif not _is_usable(answer):
            yield f"answers contains {answer!r:.200}; expected {parsing.USABLE}"


def _distinct(values: list[Any]) -> Collection[Any]:
    """The distinct values, since most fields of a million questions have few; all values if some cannot be hashed."""
    try:
        return set(values)
    except TypeError:
        return values


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_usable(value: object) -> bool:
    """Whether files can hold the text, or the texts of a tuple; true for values of other types."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, tuple | list) else ()
    return all(map(parsing.is_usable, texts))


def _is_lower(value: object) -> bool:
    return isinstance(value, str) and value == value.strip().lower()


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(item, str) for item in value)


def _is_time(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and type(value) is not bool and math.isfinite(value))


_Field = tuple[Callable[[Any], bool], str]  # whether a value fits, and what was expected
_LOWER = "a text in lower case without surrounding spaces"
_TEXTS: _Field = (_are_texts, "a tuple of texts, which may be empty")
_TIME: _Field = (_is_time, "seconds as an int or a float, or None")
_CLIP_FIELDS: Mapping[str, _Field] = {
    "clip_id": (_is_text, "a text"),
    "video": (lambda value: isinstance(value, Path), "a pathlib.Path"),
    "start_s": _TIME,
    "end_s": _TIME,
}
_QUESTION_FIELDS: Mapping[str, _Field] = {
    "question_id": (_is_text, "a text"),
    "clip_id": (_is_text, "the clip_id of a Clip"),
    "text": (_is_text, "the words of a question"),
    "answer": (_is_lower, _LOWER),
    "form": (lambda value: value in ("open", "binary"), "open or binary"),
    "tags": _TEXTS,
    "encoded": (lambda value: value is None or isinstance(value, int), "a class as an int, or None"),
    "written": (lambda value: value is None or _is_text(value), "a text or None"),
    "options": _TEXTS,
    "variants": (
        lambda value: value is None or (_are_texts(value) and len(value) == 2),
        "a paraphrase and a counterfactual, or None",
    ),
}
