"""The size that batches are padded to: a CUDA graph of a step needs all batches of an epoch in one shape."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from egopatch.train.data.question_table import NO_OPTION, QuestionTable

# Headroom: other epochs combine other clips, so a batch may hold a few more clips or texts.
ROOM = 1.1


@dataclass(frozen=True)
class BatchSize:
    """Size of a batch: how much it holds.

    Attributes:
        questions: Questions.
        clips: Unique clips.
        texts: Unique texts of the questions or of one kind of variant, whichever are more.
        options: Unique texts of options; 0 without options.
    """

    questions: int
    clips: int
    texts: int
    options: int

    @classmethod
    def of(cls, table: QuestionTable, rows: Tensor) -> "BatchSize":
        """Size of the batch of these rows of `table`."""
        texts = [table.text[rows], *([] if table.variants is None else table.variants[rows].T)]
        options = 0 if table.options is None else int((table.options[rows].unique() != NO_OPTION).sum())
        return cls(
            len(rows), len(table.clip[rows].unique()), max(len(text_rows.unique()) for text_rows in texts), options
        )

    @classmethod
    def covering(cls, table: QuestionTable, plan: Sequence[np.ndarray], most: int) -> "BatchSize":
        """A size that fits the batches of `plan` with at most `most` questions, with headroom for other orders.

        A batch exceeds `most` only if a single clip does; to cover it would pad all other batches to its size.
        """
        sizes = [cls.of(table, torch.from_numpy(rows)) for rows in plan]
        sizes = [size for size in sizes if size.questions <= most] or sizes
        # The number of questions closes a batch, so it varies least and needs no headroom.
        return cls(
            max(size.questions for size in sizes),
            *(math.ceil(ROOM * max(getattr(size, name) for size in sizes)) for name in ("clips", "texts", "options")),
        )

    def holds(self, other: "BatchSize") -> bool:
        """Whether a batch of size `other` can be padded to this one."""
        return all(getattr(self, name) >= getattr(other, name) for name in self.__dataclass_fields__)
