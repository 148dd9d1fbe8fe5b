"""Questions grouped by clip, and their features from wherever they are kept.

Shape legend: C clips of a batch, B questions, T frames, N patches a frame, D channels, L text tokens, U unique texts.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from egopatch.extract.datasets import Dataset, Question
from egopatch.features import AbsentClip, PatchTokens, Store, StoreError, read_ahead
from egopatch.features.values.dtypes import row_bytes
from egopatch.train.processes.distributed import ALONE, Ranks
from egopatch.train.processes.rank_slice import Share

Residency = Literal["disk", "ram", "gpu"]
FORMS = ("open", "binary")
# Class of an answer outside the training vocabulary: never trained on, always counted wrong.
NO_CLASS = -1

# Share of the free memory that cached features may take before `auto` leaves them on disk.
MEMORY_SHARE = 0.5
# Clips read at once while filling the GPU; bounds the extra memory of doing so.
READ_CLIPS = 64
# That read the clips of one batch.
READ_THREADS = 2


@dataclass(frozen=True)
class Batch:
    """B questions over C clips. It may lie in memory that is filled again once the next batch is asked for.

    Attributes:
        stored: tokens of the C clips, or of all clips that are kept where `clip_rows` says which ones are the C; None
            for heads that look at no video.
        clip_rows: [C] long, row of `stored` where each clip lies; None where the rows are the clips.
        clip_index: [B] long, the clip that each question reads.
        states: [U, L, D] text states; many questions are asked in the same words, which a head reads once.
        mask: [U, L] bool, true on tokens.
        text_index: [B] long, row of `states` of each question.
        forms: [B] long, index into `FORMS`.
        answers: [B] long, class or `NO_CLASS`.
        rows: [B] positions of the questions in their table.
        share: where these rows lie in the whole batch, of which other ranks have the rest; None: this is the whole.
    """

    stored: PatchTokens | None
    clip_rows: Tensor | None
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

    @cached_property
    def tokens(self) -> PatchTokens:
        """Tokens of the C clips, copied once where more are kept; psa reads `stored` in place instead."""
        assert self.stored is not None
        return PatchTokens(**{name: self.of_clips(tensor) for name, tensor in self.stored.tensors().items()})

    def of_clips(self, tensor: Tensor) -> Tensor:
        """The rows [C, ...] of one of the stored tensors."""
        return tensor if self.clip_rows is None else tensor[self.clip_rows]

    def few_at_a_time(self, clips: int) -> Iterator[PatchTokens]:
        """Tokens of the C clips, copies of so many at a time."""
        assert self.stored is not None
        rows = torch.arange(len(self.stored.cls), device=self.clip_index.device)
        for few in self.of_clips(rows).split(clips):
            yield PatchTokens(**{name: tensor[few] for name, tensor in self.stored.tensors().items()})

    def holding(self, tokens: PatchTokens) -> "Batch":
        """The same questions on these `tokens` of the C clips."""
        return replace(self, stored=tokens, clip_rows=None)

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


@dataclass(frozen=True)
class _Part:
    """What this rank has of a batch.

    Attributes:
        index: [B] rows of the table.
        clips: names of the C clips; none where other ranks have all of them.
        clip_index: [B] index into `clips`.
        share: as in `Batch`.
    """

    index: Tensor
    clips: tuple[str, ...]
    clip_index: Tensor
    share: Share | None

    @classmethod
    def of(cls, table: QuestionTable, rows: np.ndarray, own: Tensor | None) -> "_Part":
        index, share = torch.from_numpy(rows), None
        if own is not None:
            share = Share.of(table.clip[index], table.text[index], own[table.clip[index]])
            index = index[share.questions.rows]
        clips, clip_index = table.clip[index].unique(return_inverse=True)
        return cls(index, tuple(table.clips[clip] for clip in clips.tolist()), clip_index, share)


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
        self._resident: PatchTokens | None = None
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
                self._resident = self._load(own)
                self._clip_rows = {name: row for row, name in enumerate(own)}
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

    def _load(self, clips: Sequence[str]) -> PatchTokens:
        """Tokens of all `clips`, where they are to stay."""
        assert self.store is not None
        if self.residency == "ram":
            return self._read(clips)
        like = self.store.buffers(0).tensors()
        kept = {name: t.new_empty(len(clips), *t.shape[1:], device=self.device) for name, t in like.items()}
        start = 0
        for part in self._read_ahead([clips[n : n + READ_CLIPS] for n in range(0, len(clips), READ_CLIPS)]):
            for name, tensor in part.tensors().items():
                kept[name][start : start + len(tensor)].copy_(tensor)
            start += len(part.cls)
        return PatchTokens(**kept)

    def _read(self, clips: Sequence[str]) -> PatchTokens:
        assert self.store is not None
        return self._count(self.store.read(clips, threads=READ_THREADS))

    def _read_ahead(self, batches: Sequence[Sequence[str]]) -> Iterator[PatchTokens]:
        """On the device. On a CPU a batch lies in memory that is filled again once the next one is asked for."""
        assert self.store is not None
        cuda = self.device.type == "cuda"
        for tokens in read_ahead(self.store, batches, threads=READ_THREADS, pin=cuda):
            yield self._count(tokens).to(self.device, non_blocking=cuda)

    def _count(self, tokens: PatchTokens) -> PatchTokens:
        self.nbytes += sum(tensor.nbytes for tensor in tokens.tensors().values())
        return tokens

    def tokens(self, clips: Sequence[str]) -> PatchTokens:
        """A copy of the tokens of encoded clips, on the device; from the store where other ranks hold some."""
        if self._resident is None or not self._clip_rows.keys() >= set(clips):
            return self._read(clips).to(self.device)
        rows = self._rows(clips).to(self._resident.cls.device)
        return PatchTokens(**{name: tensor[rows] for name, tensor in self._resident.tensors().items()}).to(self.device)

    def _rows(self, clips: Sequence[str]) -> Tensor:
        return torch.tensor([self._clip_rows[name] for name in clips], dtype=torch.long)

    def words(self, table: QuestionTable) -> Tensor:
        """[W, D] text states of every token of the questions' unique texts."""
        texts = table.text.unique().to(self.device)
        return self._states[texts][self._mask[texts]]

    def batch(self, table: QuestionTable, rows: np.ndarray, own: Tensor | None = None) -> Batch:
        """The batch of these rows of `table`, or what this rank has of it: `own` [C] bool says which clips are its."""
        part = _Part.of(table, rows, own)
        if self.store is None or not part.clips:
            return self._batch(table, part, None)
        in_place = self.residency == "gpu" or self.device.type == "cpu"
        if self._resident is None or not in_place:
            return self._batch(table, part, self.tokens(part.clips))
        return self._batch(table, part, self._resident, self._rows(part.clips).to(self.device))

    def _batch(
        self, table: QuestionTable, part: _Part, stored: PatchTokens | None, clip_rows: Tensor | None = None
    ) -> Batch:
        texts, text_index = table.text[part.index].unique(return_inverse=True)
        texts = texts.to(self.device)
        return Batch(
            stored=stored,
            clip_rows=clip_rows,
            clip_index=part.clip_index.to(self.device),
            states=self._states[texts],
            mask=self._mask[texts],
            text_index=text_index.to(self.device),
            forms=table.form[part.index].to(self.device),
            answers=table.answer[part.index].to(self.device),
            rows=part.index,
            share=part.share,
        )

    def stream(self, table: QuestionTable, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """The batches of `plan` in order, of each what this rank has of it, which may be nothing.

        From disk, the next ones are read while one is worked on, into memory that is used again: a batch is good until
        the next one is asked for.
        """
        own = None
        if self.ranks.size > 1:
            own = torch.tensor([name in self._own for name in table.clips], dtype=torch.bool)
        if self.residency != "disk" or self.store is None:
            for rows in plan:
                yield self.batch(table, rows, own)
            return
        parts = [_Part.of(table, rows, own) for rows in plan]
        tokens = self._read_ahead([part.clips for part in parts if part.clips])
        for part in parts:
            yield self._batch(table, part, next(tokens) if part.clips else None)


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
