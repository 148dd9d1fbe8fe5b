"""Data sets: annotation files in, clips and questions out.

`records` defines the dataclasses, `parsing` reads files and reports faults by line, each adapter (such as `egotaskqa`)
reads one layout, and `registry` picks the adapter by `data.name`, from this package or another. `egosynth` renders the
synthetic set.
"""

from egopatch.extract.datasets.records import PARTS, Clip, Dataset, DatasetError, Question
from egopatch.extract.datasets.registry import load_clips, load_dataset, register_dataset, require_root

__all__ = [
    "PARTS", "Clip", "Dataset", "DatasetError", "Question", "load_clips", "load_dataset", "register_dataset",
    "require_root",
]  # fmt: skip
