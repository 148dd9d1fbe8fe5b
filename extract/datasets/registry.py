"""Annotations in, clips and questions out. One adapter a file; `load_dataset` picks it by name."""

from egopatch.configs.schema import DataConfig
from egopatch.extract.datasets import egotaskqa, jsonl
from egopatch.extract.datasets.records import Dataset


def load_dataset(data: DataConfig) -> Dataset:
    """Clips, questions and the answer vocabulary that `data` describes. Opens no video.

    Raises:
        DatasetError: annotation files are missing or malformed; one line a fault, with file and position.
    """
    if data.name == "jsonl":
        return jsonl.load(data.root / data.clips, data.root / data.questions, data.root, data.split)
    return egotaskqa.load(data.root, data.split)
