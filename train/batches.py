"""Questions grouped by clip, and their features from wherever they are kept.

Shape legend: C clips of a batch, B questions, T frames, N patches a frame, D channels, L text tokens, U unique texts.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from extract.datasets import Dataset, Question
from features import AbsentClip, PatchTokens, Store, StoreError
from features.dtypes import row_bytes
from train.ranks import ALONE, Ranks
from train.shares import Share

Residency = Literal["disk", "ram", "gpu"]
FORMS = ("open", "binary")
# Class of an answer outside the training vocabulary: never trained on, always counted wrong.
NO_CLASS = -1

# Share of the free memory that cached features may take before `auto` leaves them on disk.
MEMORY_SHARE = 0.5
# Clips read at once while filling memory; bounds the extra memory of doing so.
READ_CLIPS = 64


@dataclass(frozen=True)
class Batch:
    """B questions over C clips.

    Attributes:
        tokens: of the C clips; None for heads that look at no video.
        clip_index: [B] long, row of `tokens` that each question reads.
        states: [U, L, D] text states; many questions are asked in the same words, which a head reads once.
        mask: [U, L] bool, true on tokens.
        text_index: [B] long, row of `states` of each question.
        forms: [B] long, index into `FORMS`.
        answers: [B] long, class or `NO_CLASS`.
        rows: [B] positions of the questions in their table.
        share: where these rows lie in the whole batch, of which other ranks have the rest; None: this is the whole.
    """

    tokens: PatchTokens | None
    clip_index: Tensor
    states: Tensor
    mask: Tensor
    text_index: Tensor
    forms: Tensor
    answers: Tensor
    rows: Tensor
    share: Share | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def whole(self) -> int:
        """Questions of the whole batch, on all ranks."""
        return len(self) if self.share is None else self.share.questions.of


@dataclass(frozen=True)
class QuestionTable:
    """The questions of one part as arrays.

    Attributes:
        questions: in their order.
        clips: unique clips, in the order of first appearance.
        clip: [Q] index into `clips`.
        text: [Q] index into the texts the table was made with.
        form: [Q] index into `FORMS`.
        answer: [Q] class or `NO_CLASS`.
    """

    questions: tuple[Question, ...]
    clips: tuple[str, ...]
    clip: Tensor
    text: Tensor
    form: Tensor
    answer: Tensor

    @classmethod
    def of(cls, questions: Sequence[Question], dataset: Dataset, texts: Mapping[str, int]) -> "QuestionTable":
        """Table of `questions`; `texts` gives each text its row."""
        classes = {answer: index for index, answer in enumerate(dataset.answers)}
        clips = {name: index for index, name in enumerate(dict.fromkeys(q.clip_id for q in questions))}
        return cls(
            questions=tuple(questions),
            clips=tuple(clips),
            clip=torch.tensor([clips[q.clip_id] for q in questions], dtype=torch.long),
            text=torch.tensor([texts[q.text] for q in questions], dtype=torch.long),
            form=torch.tensor([FORMS.index(q.form) for q in questions], dtype=torch.long),
            answer=torch.tensor([classes.get(q.answer, NO_CLASS) for q in questions], dtype=torch.long),
        )

    def __len__(self) -> int:
        return len(self.questions)

    def encoded(self, unseen: Collection[str]) -> "QuestionTable":
        """The questions whose clip is not one of `unseen`."""
        lost = torch.tensor([name in unseen for name in self.clips], dtype=torch.bool)
        return self._subset(~lost[self.clip])

    def answerable(self) -> "QuestionTable":
        """The questions whose answer is in the vocabulary: those that a head can learn from."""
        return self._subset(self.answer != NO_CLASS)

    def _subset(self, keep: Tensor) -> "QuestionTable":
        if bool(keep.all()):
            return self
        kept = keep.nonzero()[:, 0]
        clips, clip = self.clip[kept].unique(return_inverse=True)
        return QuestionTable(
            questions=tuple(self.questions[row] for row in kept.tolist()),
            clips=tuple(self.clips[row] for row in clips.tolist()),
            clip=clip,
            text=self.text[kept],
            form=self.form[kept],
            answer=self.answer[kept],
        )


def plan_batches(table: QuestionTable, size: int, seed: int | None, epoch: int = 0) -> list[np.ndarray]:
    """Rows of each batch of one pass: whole clips, closed before they exceed `size` questions.

    The order follows from `seed` and `epoch` alone, so that a resumed run finds its place by counting batches. Without
    a seed the clips keep their order. A clip with more than `size` questions is a batch of its own.
    """
    by_clip = np.argsort(table.clip.numpy(), kind="stable")
    groups = np.split(by_clip, np.cumsum(np.bincount(table.clip.numpy(), minlength=len(table.clips)))[:-1])
    order = np.arange(len(groups)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(groups))
    batches: list[np.ndarray] = []
    current: list[np.ndarray] = []
    held = 0
    for clip in order:
        if current and held + len(groups[clip]) > size:
            batches.append(np.concatenate(current))
            current, held = [], 0
        current.append(groups[clip])
        held += len(groups[clip])
    return [*batches, np.concatenate(current)] if current else batches


def choose_residency(wanted: str, nbytes: int, device: torch.device, ranks: Ranks = ALONE) -> tuple[Residency, str]:
    """Where to keep `nbytes` of features, of which each rank holds an equal share, and the sentence that says so.

    Raises:
        ValueError: `gpu` was asked for without a CUDA device.
    """
    if wanted == "gpu" and device.type != "cuda":
        raise ValueError(f"train.residency is 'gpu' but the device is {device.type}; expected a CUDA device, or 'auto'")
    ram = psutil.virtual_memory().available // ranks.local_size
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    share = nbytes / ranks.size
    fits: Residency = "gpu" if share < MEMORY_SHARE * gpu else "ram" if share < MEMORY_SHARE * ram else "disk"
    chosen: Residency = fits if wanted == "auto" else wanted  # type: ignore[assignment]
    free = f"{_size(ram)} of memory free" + (f", {_size(gpu)} on the GPU" if gpu else "")
    why = f"chosen: {free}" if wanted == "auto" else f"as train.residency says; {free}"
    if ranks.size > 1:
        why += f"; each of {ranks.size} ranks reads and keeps its own clips alone, {_size(share)}"
    return chosen, f"features: {_size(nbytes)} kept {_PLACES[chosen]} ({why})"


_PLACES = {"disk": "on disk, read batch by batch", "ram": "in memory", "gpu": "on the GPU"}


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


class Features:
    """Tokens of clips and states of texts, from disk, memory or the GPU.

    Args:
        store: the clips' store; None for heads that look at no video.
        text_store: the texts' store; None for heads that read none.
        clip_ids: clips that will be asked for.
        texts: texts that will be asked for; their order gives the rows.
        residency: as in the config.
        device: where batches go.
        ranks: that share the clips. Each reads, and holds, its own alone.

    Attributes:
        text_rows: row of each text.
        unseen: clips asked for that are quarantined.
        said: the sentence on where the features are kept.
        nbytes: bytes read from the stores so far.

    Raises:
        StoreError: clips or texts are neither in the store nor quarantined.
    """

    def __init__(
        self,
        store: Store | None,
        text_store: Store | None,
        clip_ids: Sequence[str],
        texts: Sequence[str],
        residency: str,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.device = device
        self.ranks = ranks
        self.store = store
        self.nbytes = 0
        self.text_rows = {text: row for row, text in enumerate(texts)}
        self.said = "features: no video is read"
        self._resident: dict[str, Tensor] = {}
        self._clip_rows: dict[str, int] = {}
        self.residency: Residency = "ram"
        self.unseen = frozenset() if store is None else _quarantined(store, frozenset(clip_ids))
        clips = [name for name in dict.fromkeys(clip_ids) if name not in self.unseen]
        own = clips[ranks.rank :: ranks.size]
        self._own = frozenset(own)
        if store is not None:
            nbytes = len(clips) * _row_bytes(store)
            self.residency, self.said = ranks.share(lambda: choose_residency(residency, nbytes, device, ranks))
            if self.residency != "disk":
                self._load(own)
        self._states, self._mask = self._texts(text_store, texts)

    def _texts(self, store: Store | None, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        if store is None:
            return torch.zeros(len(texts), 1, 1), torch.ones(len(texts), 1, dtype=torch.bool)
        try:
            read = store.read_text(texts)
        except AbsentClip as error:
            raise StoreError(
                f"{len(error.ids)} question texts are not in {store.path}, such as {error.ids[0]!r}; "
                "encode them first: python -m extract run --config CONFIG"
            ) from None
        self.nbytes += read.states.nbytes
        longest = int(read.attention_mask.sum(1).max()) if texts else 1
        states, mask = read.states[:, :longest], read.attention_mask[:, :longest]
        return states.contiguous().to(self.device), mask.contiguous().to(self.device)

    def _load(self, clip_ids: Sequence[str]) -> None:
        place = self.device if self.residency == "gpu" else torch.device("cpu")
        for start in range(0, len(clip_ids), READ_CLIPS):
            part = self._read(clip_ids[start : start + READ_CLIPS])
            for name, tensor in part.tensors().items():
                if name not in self._resident:
                    shape = (len(clip_ids), *tensor.shape[1:])
                    self._resident[name] = torch.empty(shape, dtype=tensor.dtype, device=place)
                self._resident[name][start : start + len(tensor)].copy_(tensor)
        self._clip_rows = {name: row for row, name in enumerate(clip_ids)}

    def _read(self, clip_ids: Sequence[str]) -> PatchTokens:
        assert self.store is not None
        tokens = self.store.read(clip_ids)
        self.nbytes += sum(tensor.nbytes for tensor in tokens.tensors().values())
        return tokens

    def tokens(self, clip_ids: Sequence[str]) -> PatchTokens:
        """Tokens of encoded clips, on the device, in the store's dtype; from the store where other ranks hold some."""
        if self.residency == "disk" or not self._clip_rows.keys() >= set(clip_ids):
            return self._read(clip_ids).to(self.device)
        rows = torch.tensor([self._clip_rows[name] for name in clip_ids], dtype=torch.long)
        picked = {name: tensor[rows.to(tensor.device)] for name, tensor in self._resident.items()}
        return PatchTokens(**picked).to(self.device)

    def words(self, table: QuestionTable) -> Tensor:
        """[W, D] text states of every token of the questions' unique texts."""
        texts = table.text.unique().to(self.device)
        return self._states[texts][self._mask[texts]]

    def batch(self, table: QuestionTable, rows: np.ndarray, own: Tensor | None = None) -> Batch:
        """The batch of these rows of `table`, or what this rank has of it: `own` [C] bool says which clips are its."""
        index, share = torch.from_numpy(rows), None
        if own is not None:
            share = Share.of(table.clip[index], table.text[index], own[table.clip[index]])
            index = index[share.questions.rows]
        clips, clip_index = table.clip[index].unique(return_inverse=True)
        names = [table.clips[clip] for clip in clips.tolist()]
        tokens = None if self.store is None or not names else self.tokens(names)
        texts, text_index = table.text[index].unique(return_inverse=True)
        texts = texts.to(self.device)
        return Batch(
            tokens=tokens,
            clip_index=clip_index.to(self.device),
            states=self._states[texts],
            mask=self._mask[texts],
            text_index=text_index.to(self.device),
            forms=table.form[index].to(self.device),
            answers=table.answer[index].to(self.device),
            rows=index,
            share=share,
        )

    def stream(self, table: QuestionTable, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """The batches of `plan` in order, of each what this rank has of it, which may be nothing.

        From disk, the next batch is read while one is worked on.
        """
        own = None
        if self.ranks.size > 1:
            own = torch.tensor([name in self._own for name in table.clips], dtype=torch.bool)
        if self.residency != "disk" or self.store is None:
            for rows in plan:
                yield self.batch(table, rows, own)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            ahead = [reader.submit(self.batch, table, rows, own) for rows in plan[:1]]
            for position in range(len(plan)):
                ready = ahead.pop(0)
                ahead += [reader.submit(self.batch, table, rows, own) for rows in plan[position + 1 : position + 2]]
                yield ready.result()


def _quarantined(store: Store, clip_ids: frozenset[str]) -> frozenset[str]:
    """The clips that could not be encoded; that there are none which have yet to be is checked."""
    unseen = clip_ids - set(store.clip_ids)
    if waiting := sorted(unseen - store.quarantine.keys()):
        raise StoreError(
            f"{len(waiting)} of {len(clip_ids)} clips are not in {store.path}, such as {waiting[0]!r}; "
            "encode them first: python -m extract run --config CONFIG"
        )
    return unseen


def _row_bytes(store: Store) -> int:
    return sum(row_bytes(array) for array in store.spec.arrays)
