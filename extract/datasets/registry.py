"""The adapters of data sets by name, one file each.

Others come from the entry points `egopatch.datasets` of installed packages, each a function as `register_dataset` takes
it, and from `register_dataset`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from egopatch.configs.plugins import Plugins
from egopatch.configs.schema import ConfigError, DataConfig
from egopatch.extract.datasets import egoschema, egotaskqa, jsonl, nextqa, qaego4d
from egopatch.extract.datasets.records import PARTS, UNKNOWN_ANSWERS, Clip, Dataset, DatasetError, texts_of

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
    if callable(load):
        return None
    return f"is of type {type(load).__name__}; expected a function from DataConfig to Dataset"


_PLUGINS: Plugins[Loader] = Plugins("data.name", "egopatch.datasets", LOADERS.keys(), _fault)


def register_dataset(name: str, load: Loader, replace: bool = False) -> None:
    """Let `data.name` name a data set in this process.

    Args:
        name: Value of the option.
        load: Reads clips, questions and answer vocabulary, and opens no video. It raises `DatasetError` for annotations
            that cannot be used.
        replace: Whether to replace what an earlier call registered under the name.

    Raises:
        ConfigError: The name is taken, or `load` cannot be called.
    """
    _PLUGINS.register(name, load, replace)


def load_dataset(data: DataConfig) -> Dataset:
    """Read the clips, questions and answer vocabulary of a data set. No video is opened.

    Raises:
        DatasetError: `data.root` does not exist, or annotation files are missing or malformed; one line per fault, with
            file and position. Or the parts of a data set from outside this package do not fit together.
        ConfigError: `data.name` is unknown, or what registers it is broken.
    """
    plugin = _PLUGINS.find(data.name)
    if plugin is None and not data.root.is_dir():
        expected = "set --data.root to the folder of the annotations"
        hint = "`egopatch extract data` downloads EgoTaskQA, `make demo` renders EgoSynth"
        raise DatasetError([f"data.root is '{data.root}', which does not exist; {expected} ({hint})"])
    dataset = (plugin or LOADERS[data.name])(data)
    if not isinstance(dataset, Dataset):
        owner = _PLUGINS.package_of(data.name) or "this process"
        raise ConfigError(
            f"data.name is {data.name!r}, but its function, which {owner} registers, returns a "
            f"{type(dataset).__name__}; expected an extract.datasets.Dataset"
        )
    if plugin is not None and (faults := [f"data.name {data.name}: {fault}" for fault in _misfits(dataset)]):
        raise DatasetError(faults)
    if data.paraphrases and any(question.variants is None for question in dataset.questions.get("train", ())):
        raise ConfigError(f"data.paraphrases is true, but the data set {data.name} has no paraphrases; set it to false")
    return dataset


def load_clips(data: DataConfig) -> tuple[Clip, ...]:
    """The clips of a data set; questions in a file of their own are not read, because there may be a million.

    Raises:
        DatasetError, ConfigError: As `load_dataset`.
    """
    return load_dataset(dataclasses.replace(data, questions=None) if data.name == "jsonl" else data).clips


def _misfits(dataset: Dataset) -> Iterator[str]:
    """What is wrong with a data set from outside this package, whose adapters check their own where they know the line.

    Without this, training fails after the job has encoded every clip.
    """
    if sorted(dataset.questions) != sorted(PARTS):
        yield f"questions has the parts {sorted(dataset.questions)}; expected {list(PARTS)}, empty tuples included"
        return
    fields: dict[str, object] = {"clips": dataset.clips, "answers": dataset.answers, "texts": dataset.texts}
    fields |= {f"questions[{part!r}]": dataset.questions[part] for part in PARTS}
    kinds = {name: type(value).__name__ for name, value in fields.items()}
    wrong = [name for name, value in fields.items() if isinstance(value, str) or not isinstance(value, Sequence)]
    yield from (f"{name} is of type {kinds[name]}; expected a tuple" for name in wrong)
    if wrong:
        return
    if not dataset.clips:
        yield "clips is empty; expected at least one Clip"
    clip_ids = set[str]()
    for clip in dataset.clips:
        if not isinstance(clip, Clip) or not isinstance(clip.video, Path):
            yield f"clips contains {clip!r}; expected a Clip whose video is a pathlib.Path"
            return
        if clip.clip_id in clip_ids:
            yield f"clip_id {clip.clip_id!r} names two clips; expected unique names"
        clip_ids.add(clip.clip_id)
    for part in PARTS:
        question_ids = set[str]()
        for question in dataset.questions[part]:
            if question.question_id in question_ids:
                yield f"question_id {question.question_id!r} names two questions of {part}; expected unique names"
            question_ids.add(question.question_id)
            if not isinstance(question.text, str) or not question.text.strip():
                yield f"question {question.question_id!r}: text is {question.text!r}; expected the words of a question"
                return
            answer = question.answer
            if not isinstance(answer, str) or not (answer.strip() or question.options):
                yield f"question {question.question_id!r}: answer is {answer!r}; expected one, or options"
                return
            if question.clip_id not in clip_ids:
                yield f"question {question.question_id!r}: clip_id {question.clip_id!r} is not in clips; add it there"
    questions = [question for part in PARTS for question in dataset.questions[part]]
    if missing := sorted(set(texts_of(questions)).difference(dataset.texts)):
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        yield f"texts lacks {missing[0]!r}{others}; make it with texts_of(questions)"
    if any(not question.options for question in questions) and UNKNOWN_ANSWERS[1] not in dataset.answers:
        yield f"answers lacks {UNKNOWN_ANSWERS[1]}; make it with answer_vocabulary(training answers)"
