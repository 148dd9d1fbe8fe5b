"""The adapters of data sets by name, one file each."""

from egopatch.configs.schema import DataConfig
from egopatch.extract.datasets import egotaskqa, jsonl
from egopatch.extract.datasets.records import Dataset


def load_dataset(data: DataConfig) -> Dataset:
    """Read the clips, questions and answer vocabulary of a data set. No video is opened.

    Raises:
        DatasetError: Annotation files are missing or malformed; one line per fault, with file and position.
    """
    if data.name == "jsonl":
        return jsonl.load(data.root / data.clips, data.root / data.questions, data.root, data.split)
    return egotaskqa.load(data.root, data.split)
